"""The crowds task: five to eight objects in two groups, their numbers and places; much to get wrong.

A prompt names two groups of like objects, as in "five red circles left of two blue squares"; pictures are 3x3
cells of the shapes task.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from lacfast.rewards.reward import needs
from lacfast.tasks import checker, gold
from lacfast.tasks.predicates import RELATION_SHARE, Detection, likeness_to, relation_holds, scores
from lacfast.tasks.prompts import COLOURS, NUMBERS, RELATION_WORDS, SHAPES, Thing
from lacfast.tasks.scenes import BACKGROUND, CELL_SIZE, JITTER, PlacedObject, render
from lacfast.tasks.task import FloatArray, Prompt, Task, pixels_of

GRID = 3
"""Rows and columns of cells."""
SIZE = GRID * CELL_SIZE
"""H = W of a picture at scale 1."""
WORDS = (*NUMBERS, "five")
TOTALS = range(5, 9)
"""Objects of a picture."""
KINDS = ("both", "left_of", "above")
PER_KIND = 120
PRETRAINING_SHARE = 1.4
"""More than the other tasks: there is more to learn before some of it comes out right."""
PROMPT_SEED = 11


def all_prompts() -> list[Prompt]:
    """360 random prompts, 120 of every kind, whose groups can be placed.

    `kind` is one of KINDS, `groups` are (number, colour, shape) of both; for `left_of` and `above` all of the
    first one lie on the left of all of the second, or above them.
    """
    random = np.random.default_rng(PROMPT_SEED)
    return [prompt for kind in KINDS for prompt in _prompts(kind, random)]


def _prompts(kind: str, random: np.random.Generator) -> list[Prompt]:
    things: list[Thing] = [(colour, shape) for colour in COLOURS for shape in SHAPES]
    found: dict[str, Prompt] = {}
    while len(found) < PER_KIND:
        numbers = random.integers(1, len(WORDS) + 1, size=2).tolist()
        chosen = [things[row] for row in random.permutation(len(things))[:2]]
        if sum(numbers) in TOTALS and (kind == "both" or _borders(*numbers)):
            groups = [(number, *thing) for number, thing in zip(numbers, chosen, strict=True)]
            first, second = (_words(*group) for group in groups)
            text = f"{first} {RELATION_WORDS[kind]} {second}"
            found[text] = Prompt(text, {"kind": kind, "groups": groups})
    return list(found.values())


def _borders(first: int, second: int) -> list[int]:
    """Lines of the grid before which `first` cells are, and behind which `second` are."""
    return [line for line in range(1, GRID) if first <= GRID * line and second <= GRID * (GRID - line)]


def _words(number: int, colour: str, shape: str) -> str:
    return f"{WORDS[number - 1]} {colour} {shape}" + "s" * (number > 1)


def sample_scene(prompt: Prompt, random: np.random.Generator) -> list[PlacedObject]:
    """A random scene that obeys the prompt: uniform over the cells that its relation leaves, with jitter."""
    kind, groups = prompt.metadata["kind"], prompt.metadata["groups"]
    cells = random.permutation(GRID**2)
    if kind in ("left_of", "above"):
        # Cells before a border of columns, or of rows, are the first group's, those behind it the second's.
        first, second = groups[0][0], groups[1][0]
        border = random.choice(_borders(first, second))
        place = cells % GRID if kind == "left_of" else cells // GRID
        cells = np.concatenate([cells[place < border][:first], cells[place >= border][:second]])
    things = [(colour, shape) for number, colour, shape in groups for _ in range(number)]
    scene = []
    for (colour, shape), cell in zip(things, cells.tolist(), strict=False):
        shift_y, shift_x = random.integers(-JITTER, JITTER + 1, size=2).tolist()
        row, column = divmod(cell, GRID)
        scene.append(PlacedObject(colour, shape, row, column, shift_y, shift_x))
    return scene


def sample_images(prompts: Sequence[Prompt], random: np.random.Generator, scale: int = 1) -> FloatArray:
    """One ground-truth picture per prompt, (B, 3, H, W) float32 in [0, 1]; H = W = scale SIZE."""
    return np.stack([render(sample_scene(prompt, random), scale, SIZE) for prompt in prompts])


def task(scale: int = 1) -> Task:
    """The crowds task with pictures of H = W = scale SIZE; prompts and scenes are the same."""
    return Task(
        name="crowds" if scale == 1 else f"crowds-{scale * SIZE}",
        prompts=all_prompts,
        draw=partial(sample_images, scale=scale),
        background=BACKGROUND,
        image_size=scale * SIZE,
        held_out_per_kind=20,
        pretraining_share=PRETRAINING_SHARE,
    )


TASK = task()


def check_prompt(prompt: str, metadata: dict[str, Any]) -> None:
    """
    Raises:
        ValueError: for metadata that say not what a picture must show.
    """
    if metadata.get("kind") not in KINDS or len(metadata.get("groups", ())) != 2:
        raise ValueError(
            f"its metadata {metadata} name no kind of {', '.join(KINDS)} with two groups; take the prompts "
            "of the task, 'crowds' or 'crowds-held-out', or a .jsonl file that gives both"
        )


def score(detections: Sequence[Detection], metadata: dict[str, Any]) -> tuple[float, float]:
    """Strict and partial score of one image.

    strict  = 1 where exactly the wanted objects are seen and the relation holds between all of them, else 0
    partial = sum of likenesses over the best matching / max(wanted, seen): half a point for the colour, half
              for the shape; for a relation that counts 3/4, and the share of its pairs that obey it adds 1/4
    """
    check_prompt("", metadata)
    kind, groups = metadata["kind"], [tuple(group) for group in metadata["groups"]]
    wanted = [(colour, shape) for number, colour, shape in groups for _ in range(number)]
    alike = np.array([[likeness_to(thing, seen) for seen in detections] for thing in wanted])
    matched = alike[linear_sum_assignment(alike, maximize=True)].sum() if detections else 0.0
    objects = matched / max(len(wanted), len(detections))
    share = RELATION_SHARE if kind in ("left_of", "above") else 0.0
    obeyed = _obeyed(kind, groups, detections)
    strict = obeyed == 1 and Counter(wanted) == Counter((seen.colour, seen.shape) for seen in detections)
    return float(strict), float((1 - share) * objects + share * obeyed)


def _obeyed(kind: str, groups: Sequence[Any], detections: Sequence[Detection]) -> float:
    """Share of the pairs of first and second group that obey the relation; 0 without a pair."""
    first, second = (
        [seen for seen in detections if (seen.colour, seen.shape) == group[1:]] for group in groups
    )
    pairs = [relation_holds(kind, one, other) for one in first for other in second]
    return float(np.mean(pairs)) if pairs else 0.0


Detect = Callable[[FloatArray, int], list[list[Detection]]]


def _scores(images: Tensor, metadata: Sequence[dict[str, Any]], detect: Detect) -> Tensor:
    """Strict and partial scores (2, B) of images (B, 3, H, W)."""
    return torch.from_numpy(np.stack(scores(detect(pixels_of(images), SIZE), metadata, score)))


@needs(check_prompt)
def crowds_strict(images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
    """1 where the image shows exactly what the prompt says, else 0; (B,) float32 on the CPU, no gradient."""
    return _scores(images, metadata, checker.detect)[0]


@needs(check_prompt)
def crowds_reward(images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
    """0.5 strict + 0.5 partial, (B,) float32 in [0, 1] on the CPU, no gradient."""
    return _scores(images, metadata, checker.detect).mean(dim=0)


@needs(check_prompt)
def crowds_gold(images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
    """Strict accuracy by the second checker, never trained on: it tells obedience from an exploit."""
    return _scores(images, metadata, gold.detect)[0]
