"""The OCR reward counts the characters that are wrong in the text that a prompt asks for."""

from __future__ import annotations

import re
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from refusals import Refusal

from lacfast.rewards.ocr import OCRAccuracy, Pixels, accuracy, edit_distance, wanted_text

IMAGES = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
TEXT = st.text("abc", max_size=8)


@pytest.mark.parametrize(
    ("read", "wanted", "expected"),
    [
        ("Hello World", "hello world", 1.0),
        ("xx HELLOWORLD yy", "Hello World", 1.0),
        ("Hallo", "Hello", 0.8),
        ("", "Hello", 0.0),
        ("a very long text about other things", "Xy", 0.0),
        ("kitten", "sitting", 1 - 3 / 7),
    ],
)
def test_accuracy_is_one_minus_the_share_of_wrong_characters(read: str, wanted: str, expected: float) -> None:
    assert accuracy(read, wanted) == pytest.approx(expected)


@given(TEXT, TEXT, TEXT)
def test_edit_distance_is_a_metric(first: str, second: str, third: str) -> None:
    assert edit_distance(first, second) == edit_distance(second, first)
    assert (edit_distance(first, second) == 0) == (first == second)
    assert edit_distance(first, third) <= edit_distance(first, second) + edit_distance(second, third)
    assert edit_distance(first, second) >= abs(len(first) - len(second))


def test_wanted_text_is_in_quotes_or_in_the_metadata() -> None:
    assert wanted_text('a sign "STOP" beside "GO"', {}) == "STOP"
    assert wanted_text("a sign \u201cSTOP\u201d", {}) == "STOP"
    assert wanted_text('a sign "STOP"', {"text": "GO"}) == "GO"
    for prompt in ("a sign", 'a sign ""', 'a sign " "'):
        with pytest.raises(ValueError, match="no text to read in prompt"):
            wanted_text(prompt, {})


def test_an_engine_gets_rgb_pixels_and_its_pieces_are_joined() -> None:
    seen: list[Pixels] = []

    def engine(pixels: Pixels) -> list[str]:
        seen.append(pixels)
        return ["HEL", "LO"] if len(seen) == 1 else []

    scores = OCRAccuracy(engine=engine)(IMAGES, ['"hello"', '"bye"'], [{}, {}])
    assert scores.tolist() == [1.0, 0.0]
    assert seen[0].shape == (8, 8, 3)
    assert np.array_equal(seen[1], (IMAGES[1] * 255).round().byte().permute(1, 2, 0).numpy())


def test_prompts_are_checked_before_an_engine_runs() -> None:
    def engine(pixels: Pixels) -> list[str]:
        raise AssertionError("must not run")

    with Refusal(
        "no text to read in prompt 'b'",
        cause="A prompt of the OCR reward without a quoted text.",
        remedy='put it in double quotes or give metadata {"text": ...}',
    ).raised():
        OCRAccuracy(engine=engine)(IMAGES, ['"a"', "b"], [{}, {}])


def test_an_engine_that_fails_is_not_scored_as_unreadable() -> None:
    def engine(pixels: Pixels) -> list[str]:
        raise MemoryError("no memory")

    with pytest.raises(MemoryError):
        OCRAccuracy(engine=engine)(IMAGES, ['"a"', '"b"'], [{}, {}])


def test_unknown_engines_list_the_known() -> None:
    with Refusal(
        "unknown OCR engine 'tesseract'",
        cause="An engine that the OCR reward has no adapter for.",
        remedy="known: rapidocr, rapidocr_line, easyocr, paddleocr, or a function",
    ).raised():
        OCRAccuracy(engine="tesseract")


@pytest.mark.parametrize(
    ("engine", "command"),
    [
        ("rapidocr", "pip install 'lacfast[rewards]'"),
        ("rapidocr_line", "pip install 'lacfast[rewards]'"),
        ("easyocr", "pip install easyocr"),
        ("paddleocr", "pip install 'paddleocr>=3' paddlepaddle"),
    ],
)
def test_a_missing_package_gives_its_install_command_before_any_image_is_made(
    monkeypatch: pytest.MonkeyPatch, engine: str, command: str
) -> None:
    monkeypatch.setitem(sys.modules, engine.removesuffix("_line"), None)
    with pytest.raises(ImportError, match=re.escape(command)):
        OCRAccuracy(engine=engine)


def packages() -> dict[str, ModuleType]:
    """Each package's interface: an engine that reads its image's first pixel."""

    def first(pixels: Pixels) -> str:
        return "".join(f"{level:03d}" for level in pixels[0, 0])

    modules = {name: ModuleType(name) for name in ("rapidocr", "easyocr", "paddleocr")}
    rapid: Any = modules["rapidocr"]
    rapid.RapidOCR = lambda params: (
        lambda pixels: SimpleNamespace(txts=(first(pixels),) if pixels.any() else None)
    )
    easy: Any = modules["easyocr"]
    easy.Reader = lambda languages, gpu, verbose: SimpleNamespace(
        readtext=lambda pixels, detail: [first(pixels)]
    )
    paddle: Any = modules["paddleocr"]
    paddle.PaddleOCR = lambda **settings: SimpleNamespace(
        predict=lambda pixels: [{"rec_texts": [first(pixels)]}]
    )
    for name, module in modules.items():
        module.__spec__ = ModuleSpec(name, None)
    return modules


@pytest.mark.parametrize(
    ("engine", "expected"),
    [("rapidocr", "003002001"), ("easyocr", "001002003"), ("paddleocr", "003002001")],
)
def test_each_package_gets_the_order_of_channels_that_it_reads(
    monkeypatch: pytest.MonkeyPatch, engine: str, expected: str
) -> None:
    monkeypatch.setitem(sys.modules, engine, packages()[engine])
    image = torch.tensor([1.0, 2.0, 3.0]).reshape(1, 3, 1, 1).expand(1, 3, 4, 4) / 255
    assert OCRAccuracy(engine=engine)(image, [f'"{expected}"'], [{}]).tolist() == [1.0]


def test_rapidocr_finding_nothing_is_a_score_of_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rapidocr", packages()["rapidocr"])
    assert OCRAccuracy(engine="rapidocr")(torch.zeros(1, 3, 4, 4), ['"a"'], [{}]).tolist() == [0.0]
