"""Text rendering: how much of the text in the prompt's quotes an OCR engine reads in the image."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec
from threading import Lock
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lacfast.rewards.image_files import to_uint8

Pixels = npt.NDArray[np.uint8]
OCREngine = Callable[[Pixels], list[str]]
"""RGB image (H, W, 3) uint8 -> the pieces of text in it, in reading order."""

_QUOTED = re.compile(r'"([^"]+)"|\u201c([^\u201d]+)\u201d')


@dataclass(kw_only=True, eq=False)
class OCRAccuracy:
    """1 - min(d, n) / n, d the edit distance between what is read and the n characters that are wanted.

    As flow_grpo: capitals and spaces do not count, and d is 0 when the wanted text stands anywhere in what is
    read. An engine that fails raises here; flow_grpo scores such an image 0.
    """

    name: str = "ocr"
    engine: str | OCREngine = "rapidocr"
    """"rapidocr", "easyocr" or "paddleocr", whose package is imported at the first call; "rapidocr_line",
    which looks for no text but takes an image for one line of it; or a function. Without the package an
    ImportError gives the command that installs it."""
    _read: OCREngine | None = field(default=None, init=False, repr=False)
    _lock: Lock = field(default_factory=Lock, init=False, repr=False)

    def __post_init__(self) -> None:
        if isinstance(self.engine, str) and self.engine not in _ENGINES:
            raise ValueError(
                f"unknown OCR engine {self.engine!r}; known: {', '.join(_ENGINES)}, or a function"
            )
        # Now, and not after the first images have been made.
        if isinstance(self.engine, str) and find_spec(package := _package(self.engine)) is None:
            raise ImportError(f"engine={self.engine!r} needs its package: {_INSTALL[package]}")

    def check_prompt(self, prompt: str, metadata: dict[str, Any]) -> None:
        """
        Raises:
            ValueError: for a prompt without a wanted text.
        """
        wanted_text(prompt, metadata)

    def __call__(self, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
        """(B,) float32 in [0, 1] on the CPU; no gradient.

        Args:
            images: (B, 3, H, W) float in [0, 1].
            prompts: each with the wanted text in double quotes, unless its metadata say it.
            metadata: `text`, where present, is the wanted text.

        Raises:
            ValueError: for a prompt without a wanted text.
        """
        # Before an engine is loaded or run.
        wanted = [wanted_text(prompt, about) for prompt, about in zip(prompts, metadata, strict=True)]
        scores = [self.score(read, target) for read, target in zip(self.read(images), wanted, strict=True)]
        return torch.tensor(scores, dtype=torch.float32)

    def read(self, images: Tensor) -> list[str]:
        """What the engine reads in each of images (B, 3, H, W) in [0, 1], its pieces joined."""
        with self._lock:
            engine = self._loaded()
            return ["".join(engine(pixels)) for pixels in to_uint8(images)]

    def score(self, read: str, wanted: str) -> float:
        """The score of an image in which the engine reads `read`."""
        return accuracy(read, wanted)

    def prepare(self) -> None:
        """Load the engine now, and not at the first call."""
        with self._lock:
            self._loaded()

    def _loaded(self) -> OCREngine:
        if self._read is None:
            self._read = _ENGINES[self.engine]() if isinstance(self.engine, str) else self.engine
        return self._read


def wanted_text(prompt: str, metadata: dict[str, Any]) -> str:
    """What the image should say: metadata["text"], else the first text in double quotes.

    Raises:
        ValueError: when there is none.
    """
    quoted = _QUOTED.search(prompt)
    text = str(metadata.get("text", (quoted[1] or quoted[2]) if quoted else ""))
    if not normalized(text):
        raise ValueError(
            f'no text to read in prompt {prompt!r}; put it in double quotes or give metadata {{"text": ...}}'
        )
    return text


def accuracy(read: str, wanted: str) -> float:
    """1 - min(d, n) / n of `OCRAccuracy`."""
    read, wanted = normalized(read), normalized(wanted)
    if wanted in read:
        return 1.0
    return 1.0 - min(edit_distance(read, wanted), len(wanted)) / len(wanted)


def edit_distance(first: str, second: str) -> int:
    """Insertions, deletions and substitutions of characters that make one of the other (Levenshtein)."""
    row = list(range(len(second) + 1))
    for i, left in enumerate(first, start=1):
        previous, row[0] = row[0], i
        for j, right in enumerate(second, start=1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (left != right))
    return row[-1]


def normalized(text: str) -> str:
    """Text without spaces, in small letters."""
    return "".join(text.split()).lower()


def _package(engine: str) -> str:
    """The package that an engine comes with."""
    return engine.removesuffix("_line")


def _rapidocr(**settings: Any) -> OCREngine:
    from rapidocr import RapidOCR

    # Its own choice is a thread for every core, as if nothing else were running.
    threads = {"EngineConfig.onnxruntime.intra_op_num_threads": torch.get_num_threads()}
    engine = RapidOCR(params={"Global.log_level": "warning", **threads, **settings})

    def read(pixels: Pixels) -> list[str]:
        # RapidOCR takes OpenCV's order of channels; nothing found is None.
        found: Any = engine(np.ascontiguousarray(pixels[..., ::-1]))
        return list(found.txts or [])

    return read


def _rapidocr_line() -> OCREngine:
    # Short lines are not padded to the width of long ones, which costs three times as much for a word.
    shape = {"Rec.rec_img_shape": [3, 48, 48]}
    return _rapidocr(**{"Global.use_det": False, "Global.use_cls": False}, **shape)


def _easyocr() -> OCREngine:
    import easyocr

    reader = easyocr.Reader(["en"], gpu=torch.cuda.is_available(), verbose=False)
    return lambda pixels: list(reader.readtext(pixels, detail=0))


def _paddleocr() -> OCREngine:
    from paddleocr import PaddleOCR

    engine = PaddleOCR(
        lang="en",
        use_doc_orientation_classify=False,
        use_doc_unwarping=False,
        use_textline_orientation=False,
    )
    return lambda pixels: [
        text for page in engine.predict(np.ascontiguousarray(pixels[..., ::-1])) for text in page["rec_texts"]
    ]


_INSTALL = {
    "rapidocr": "pip install 'lacfast[rewards]'",
    "easyocr": "pip install easyocr",
    "paddleocr": "pip install 'paddleocr>=3' paddlepaddle",
}
_ENGINES: dict[str, Callable[[], OCREngine]] = {
    "rapidocr": _rapidocr,
    "rapidocr_line": _rapidocr_line,
    "easyocr": _easyocr,
    "paddleocr": _paddleocr,
}
