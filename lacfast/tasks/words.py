"""The words task: three capitals in a line, read by an OCR engine that nobody here wrote.

Pictures are as tiny as the other tasks', but the reward is a published recogniser's own reading of their
pixels: not differentiable, learnt, and imperfect. Templates judge beside it and are never trained on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lacfast.rewards.ocr import OCRAccuracy, OCREngine, normalized, wanted_text
from lacfast.rewards.reward import needs
from lacfast.tasks.glyphs import BACKGROUND, CELL_SIZE, INK, JITTER, UNKNOWN, letter_mask
from lacfast.tasks.task import BASE_SIZE, FloatArray, Prompt, Task, pixels_of

LETTERS = "aehilntx"
"""Letters of glyphs.FONT; the engine takes a C at the end of a line for an O, and an O for a 0."""
LENGTH = 3
LETTER_WIDTH = 10
PITCH = 11
"""Pixels from one letter to the next."""
MIN_CORRELATION = 0.5
"""Correlation with the best template below which a cell shows no letter."""
NUM_WORDS = 300
WORD_SEED = 11
LINE = slice((BASE_SIZE - CELL_SIZE) // 2, (BASE_SIZE + CELL_SIZE) // 2)
"""The rows of the line of text."""


def all_prompts() -> list[Prompt]:
    """300 prompts of random words; none doubles a letter, for which a reader of lines needs a gap."""
    random = np.random.default_rng(WORD_SEED)
    words: dict[str, None] = {}
    while len(words) < NUM_WORDS:
        letters = random.choice(list(LETTERS), size=LENGTH)
        if all(letters[1:] != letters[:-1]):
            words["".join(letters)] = None
    return [Prompt("write " + " ".join(word), {"kind": "word", "text": word}) for word in words]


@cache
def _letter(letter: str, shift_y: int) -> FloatArray:
    """Ink of one letter, (CELL_SIZE, LETTER_WIDTH) of 0 and 1."""
    margin = (CELL_SIZE - LETTER_WIDTH) // 2
    return letter_mask(letter, shift_y)[:, margin : margin + LETTER_WIDTH]


def render(word: str, random: np.random.Generator) -> FloatArray:
    """A picture of a word, (3, H, W) in [0, 1], letters moved up or down by up to JITTER."""
    ink = np.zeros((BASE_SIZE, BASE_SIZE), dtype=np.float32)
    for position, letter in enumerate(word):
        shift = int(random.integers(-JITTER, JITTER + 1))
        ink[LINE, position * PITCH :][:, :LETTER_WIDTH] = _letter(letter, shift)
    return np.repeat((BACKGROUND + ink * (INK - BACKGROUND))[None], 3, axis=0).astype(np.float32)


def draw(prompts: Sequence[Prompt], random: np.random.Generator) -> FloatArray:
    """One picture per prompt, (B, 3, H, W) in [0, 1]."""
    return np.stack([render(prompt.metadata["text"], random) for prompt in prompts])


TASK = Task(
    name="words",
    prompts=all_prompts,
    draw=draw,
    background=BACKGROUND,
    image_size=BASE_SIZE,
    held_out_per_kind=60,
    pretraining_share=0.14,
)


@dataclass(kw_only=True, eq=False)
class WordsOCR(OCRAccuracy):
    """Share of the word's letters that the engine reads on the line, (B,) float32 in [0, 1]."""

    name: str = "words_ocr"
    engine: str | OCREngine = "rapidocr_line"

    def read(self, images: Tensor) -> list[str]:
        return super().read(images[..., LINE, :])


@dataclass(kw_only=True, eq=False)
class WordsOCRStrict(WordsOCR):
    """1 where the engine reads exactly the word, else 0; (B,) float32."""

    name: str = "words_ocr_strict"

    def score(self, read: str, wanted: str) -> float:
        return float(normalized(read) == normalized(wanted))


@cache
def _templates() -> tuple[list[str], FloatArray]:
    """The letter of every template, and templates (P, CELL_SIZE * LETTER_WIDTH) of mean 0 and length 1."""
    shifts = range(-JITTER, JITTER + 1)
    masks = np.stack([_letter(letter, shift).ravel() for letter in LETTERS for shift in shifts])
    return [letter for letter in LETTERS for _ in shifts], _standardized(-masks)


def _standardized(rows: FloatArray) -> FloatArray:
    """Rows with mean 0 and length 1; those without contrast stay 0."""
    centred = rows - rows.mean(axis=1, keepdims=True)
    unit: FloatArray = centred / np.maximum(np.linalg.norm(centred, axis=1, keepdims=True), 1e-6)
    return unit


def read_by_templates(images: FloatArray) -> list[str]:
    """The word that each image (B, 3, H, W) shows: of each letter the template that correlates most."""
    line = images.mean(axis=1)[:, LINE]
    cells = [line[:, :, left : left + LETTER_WIDTH] for left in range(0, LENGTH * PITCH, PITCH)]
    names, templates = _templates()
    correlation = _standardized(np.stack(cells, axis=1).reshape(-1, templates.shape[1])) @ templates.T
    letters = [
        names[index] if found >= MIN_CORRELATION else UNKNOWN
        for index, found in zip(correlation.argmax(axis=1), correlation.max(axis=1), strict=True)
    ]
    return ["".join(letters[first : first + LENGTH]) for first in range(0, len(letters), LENGTH)]


@needs(wanted_text)
def words_gold(images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
    """1 where templates read exactly the word, else 0; (B,) float32.

    Never trained on: it tells a word from strokes that only the engine takes for one.
    """
    seen = read_by_templates(pixels_of(images))
    wanted = [wanted_text(prompt, about) for prompt, about in zip(prompts, metadata, strict=True)]
    return torch.tensor([float(text == word) for text, word in zip(seen, wanted, strict=True)])
