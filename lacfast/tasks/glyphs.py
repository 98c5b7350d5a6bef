"""The glyphs task: short words drawn in capital letters, and two readers that judge them.

A word of two to four letters fills a 2x2 grid of cells in reading order. OCR rewards (Flow-GRPO's text
rendering) ask for the same, with real fonts and a real recogniser.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lacfast.rewards.ocr import edit_distance
from lacfast.rewards.reward import needs
from lacfast.tasks.task import BASE_SIZE, FloatArray, Prompt, Task, pixels_of, scale_of

# Pixels at scale 1.
CELL_SIZE = 16
GRID = BASE_SIZE // CELL_SIZE
SCALE = 2
"""Pixels per pixel of the font."""
JITTER = 1
BACKGROUND = 0.8
INK = 0.1
NUM_WORDS = 100
"""Number of words of every length."""
WORD_SEED = 7
UNKNOWN = "?"
"""A cell that shows ink but no letter."""

FONT = {
    "a": (".###.", "#...#", "#...#", "#####", "#...#", "#...#", "#...#"),
    "c": (".####", "#....", "#....", "#....", "#....", "#....", ".####"),
    "e": ("#####", "#....", "#....", "####.", "#....", "#....", "#####"),
    "h": ("#...#", "#...#", "#...#", "#####", "#...#", "#...#", "#...#"),
    "i": (".###.", "..#..", "..#..", "..#..", "..#..", "..#..", ".###."),
    "l": ("#....", "#....", "#....", "#....", "#....", "#....", "#####"),
    "n": ("#...#", "##..#", "##..#", "#.#.#", "#..##", "#..##", "#...#"),
    "o": (".###.", "#...#", "#...#", "#...#", "#...#", "#...#", ".###."),
    "t": ("#####", "..#..", "..#..", "..#..", "..#..", "..#..", "..#.."),
    "x": ("#...#", "#...#", ".#.#.", "..#..", ".#.#.", "#...#", "#...#"),
}
"""Capitals on 5x7 pixels, by their small letter."""

MIN_INK = 12
"""Dark pixels below which a cell is empty."""
MIN_OVERLAP = 0.6
"""Intersection over union with the best template below which a cell shows no letter."""
MAX_DISTANCE = 0.2
"""Root mean square distance to the nearest picture of a cell above which the gold reader sees no letter."""


def all_prompts() -> list[Prompt]:
    """300 prompts: 100 random words of each length; those of three and more double no letter."""
    random = np.random.default_rng(WORD_SEED)
    prompts = []
    for length in range(2, GRID**2 + 1):
        words: dict[str, None] = {}
        # There are only 90 words of two different letters, so those may double one.
        while len(words) < NUM_WORDS:
            letters = random.choice(list(FONT), size=length)
            if length == 2 or all(letters[1:] != letters[:-1]):
                words["".join(letters)] = None
        prompts += [_prompt(word) for word in words]
    return prompts


def _prompt(word: str) -> Prompt:
    return Prompt("write " + " ".join(word), {"kind": f"{len(word)} letters", "word": word})


@cache
def letter_mask(letter: str, shift_y: int = 0, shift_x: int = 0, scale: int = 1) -> FloatArray:
    """Ink of one letter in its cell, (S, S) of 0 and 1, read-only; S = scale CELL_SIZE."""
    rows = np.asarray([[float(pixel == "#") for pixel in row] for row in FONT[letter]], dtype=np.float32)
    drawn = np.kron(rows, np.ones((SCALE, SCALE), dtype=np.float32))
    mask = np.zeros((CELL_SIZE, CELL_SIZE), dtype=np.float32)
    top, left = ((CELL_SIZE - size) // 2 for size in drawn.shape)
    mask[top + shift_y :, left + shift_x :][: drawn.shape[0], : drawn.shape[1]] = drawn
    mask = np.kron(mask, np.ones((scale, scale), dtype=np.float32))
    mask.setflags(write=False)
    return mask


def render(word: str, random: np.random.Generator, scale: int = 1) -> FloatArray:
    """A picture of a word, (3, H, W) in [0, 1], letters moved by up to JITTER; H = W = scale BASE_SIZE."""
    size = scale * CELL_SIZE
    ink = np.zeros((GRID * size, GRID * size), dtype=np.float32)
    for position, letter in enumerate(word):
        top, left = (size * index for index in divmod(position, GRID))
        shift_y, shift_x = random.integers(-JITTER, JITTER + 1, size=2).tolist()
        ink[top : top + size, left : left + size] = letter_mask(letter, shift_y, shift_x, scale)
    return np.repeat((BACKGROUND + ink * (INK - BACKGROUND))[None], 3, axis=0).astype(np.float32)


def draw(prompts: Sequence[Prompt], random: np.random.Generator, scale: int = 1) -> FloatArray:
    """One picture per prompt, (B, 3, H, W) in [0, 1]; H = W = scale BASE_SIZE."""
    return np.stack([render(prompt.metadata["word"], random, scale) for prompt in prompts])


def task(scale: int = 1) -> Task:
    """The glyphs task with pictures of H = W = scale BASE_SIZE; prompts are the same."""
    return Task(
        name="glyphs" if scale == 1 else f"glyphs-{scale * BASE_SIZE}",
        prompts=all_prompts,
        draw=partial(draw, scale=scale),
        background=BACKGROUND,
        image_size=scale * BASE_SIZE,
        held_out_per_kind=20,
        pretraining_share=0.4,
    )


TASK = task()


@cache
def _alignments(scale: int) -> tuple[list[str], FloatArray]:
    """The letter of every template, and masks (P, S * S) at nine places each; S = scale CELL_SIZE."""
    shifts = [(dy, dx) for dy in range(-JITTER, JITTER + 1) for dx in range(-JITTER, JITTER + 1)]
    names = [letter for letter in FONT for _ in shifts]
    masks = np.stack([letter_mask(letter, *shift, scale) for letter in FONT for shift in shifts])
    return names, masks.reshape(len(names), -1)


def _cells(images: FloatArray) -> FloatArray:
    """(B * GRID^2, S^2) grey cells in reading order; S = H / GRID."""
    size = scale_of(images) * CELL_SIZE
    grey = images.mean(axis=1).reshape(-1, GRID, size, GRID, size)
    cells: FloatArray = grey.transpose(0, 1, 3, 2, 4).reshape(-1, size**2)
    return cells


def _words(characters: Sequence[str]) -> list[str]:
    """Cells in reading order as one word per image; an empty cell between letters stays a space."""
    size = GRID**2
    return ["".join(characters[start : start + size]).rstrip() for start in range(0, len(characters), size)]


def read(images: FloatArray) -> list[str]:
    """The word that each image (B, 3, H, W) shows: dark pixels of a cell against every template."""
    dark = (_cells(images) < (BACKGROUND + INK) / 2).astype(np.float32)
    scale = scale_of(images)
    names, templates = _alignments(scale)
    intersection = dark @ templates.T
    union = dark.sum(axis=1)[:, None] + templates.sum(axis=1) - intersection
    overlap = intersection / union
    best = overlap.argmax(axis=1)
    return _words(
        [
            " " if area < MIN_INK * scale**2 else names[index] if found >= MIN_OVERLAP else UNKNOWN
            for area, index, found in zip(dark.sum(axis=1), best, overlap.max(axis=1), strict=True)
        ]
    )


def read_gold(images: FloatArray) -> list[str]:
    """Words like `read`, by the nearest of all pictures of a cell, the empty one among them."""
    names, masks = _alignments(scale_of(images))
    pictures = BACKGROUND + np.concatenate([np.zeros_like(masks[:1]), masks]) * (INK - BACKGROUND)
    cells = _cells(images)
    squared = (cells**2).sum(1)[:, None] + (pictures**2).sum(1) - 2 * cells @ pictures.T
    distance = np.sqrt(np.maximum(squared.min(axis=1), 0) / cells.shape[1])
    shown = [" ", *names]
    return _words(
        [
            shown[index] if far <= MAX_DISTANCE else UNKNOWN
            for index, far in zip(squared.argmin(axis=1), distance, strict=True)
        ]
    )


def check_prompt(prompt: str, metadata: dict[str, Any]) -> None:
    """
    Raises:
        ValueError: for metadata that say not which word a picture must show.
    """
    if not metadata.get("word"):
        raise ValueError(
            "its metadata lack 'word'; take the prompts of the task, 'glyphs' or 'glyphs-held-out', or a "
            ".jsonl file that gives it"
        )


@needs(check_prompt)
def glyphs_strict(images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
    """1 where the image shows exactly the word, else 0; (B,) float32 on the CPU, no gradient."""
    words = [entry["word"] for entry in metadata]
    return _scores([float(seen == word) for seen, word in zip(read(pixels_of(images)), words, strict=True)])


@needs(check_prompt)
def glyphs_reward(images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
    """1 - edit distance / letters of the word, at least 0 (Flow-GRPO's OCR reward); (B,) float32."""
    words = [entry["word"] for entry in metadata]
    seen = read(pixels_of(images))
    return _scores(
        [max(0.0, 1 - edit_distance(text, word) / len(word)) for text, word in zip(seen, words, strict=True)]
    )


@needs(check_prompt)
def glyphs_gold(images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
    """Accuracy like `glyphs_strict`, by the second reader, which is never trained on."""
    words = [entry["word"] for entry in metadata]
    seen = read_gold(pixels_of(images))
    return _scores([float(text == word) for text, word in zip(seen, words, strict=True)])


def _scores(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float32)
