"""What it means to obey a prompt, given the objects that a checker has seen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Any

import numpy as np

from lacfast.config.checks import unknown
from lacfast.tasks.prompts import KINDS, Thing
from lacfast.tasks.task import FloatArray

RELATION_MARGIN = 6.0
"""Pixels that two centres must lie apart along the axis of a relation: half an object."""
RELATION_SHARE = 0.25
"""Share of the partial score that the relation earns; the objects earn the rest."""


@dataclass(frozen=True)
class Detection:
    """An object that a checker saw; colour or shape is "" where it resembles nothing known."""

    colour: str
    shape: str
    y: float
    x: float


def relation_holds(kind: str, first: Detection, second: Detection) -> bool:
    """Whether the centres obey `left_of` or `above`."""
    if kind == "left_of":
        return second.x - first.x >= RELATION_MARGIN
    if kind == "above":
        return second.y - first.y >= RELATION_MARGIN
    return True


def likeness_to(wanted: Thing, seen: Detection) -> float:
    """Half a point for the colour, half for the shape."""
    return 0.5 * (seen.colour == wanted[0]) + 0.5 * (seen.shape == wanted[1])


def check_prompt(prompt: str, metadata: dict[str, Any]) -> None:
    """
    Raises:
        ValueError: for metadata that say not what a picture must show.
    """
    missing = [key for key in ("kind", "objects") if key not in metadata]
    if missing:
        raise ValueError(
            f"its metadata lack {' and '.join(map(repr, missing))}; take the prompts of the task, 'shapes' "
            "or 'shapes-held-out', or a .jsonl file that gives both"
        )
    if metadata["kind"] not in KINDS:
        raise unknown("kind of prompt", metadata["kind"], KINDS)


def score(detections: Sequence[Detection], metadata: dict[str, Any]) -> tuple[float, float]:
    """Strict and partial score of one image.

    strict  = 1 where exactly the wanted objects are seen and the relation holds, else 0
    partial = sum of likenesses over the best matching / max(wanted, seen): half a point for the colour, half
              for the shape; for a relation that counts 3/4, and two exact matches that obey it add 1/4
    """
    check_prompt("", metadata)
    kind, wanted = metadata["kind"], [tuple(thing) for thing in metadata["objects"]]
    # More than six objects never match; the cut bounds the permutations on images of noise.
    seen = list(detections[:6])
    best_likeness, obeyed = _best_matching(kind, wanted, seen)
    objects = best_likeness / max(len(wanted), len(detections))
    share = RELATION_SHARE if kind in ("left_of", "above") else 0.0
    partial = (1 - share) * objects + share * obeyed
    strict = obeyed and len(detections) == len(wanted)
    return float(strict), float(partial)


Judge = Callable[[Sequence[Detection], dict[str, Any]], tuple[float, float]]


def scores(
    seen: Sequence[Sequence[Detection]], metadata: Sequence[dict[str, Any]], judge: Judge = score
) -> tuple[FloatArray, FloatArray]:
    """Strict and partial score by `judge` of every image, (B,) each, of what a checker has `seen` in it.

    Raises:
        ValueError: for another number of images than of metadata.
    """
    if len(seen) != len(metadata):
        raise ValueError(f"{len(seen)} images do not fit {len(metadata)} metadata: give one image per prompt")
    found = [judge(detections, wanted) for detections, wanted in zip(seen, metadata, strict=True)]
    strict, partial = np.asarray(found, dtype=np.float32).reshape(-1, 2).T
    return strict, partial


def _best_matching(kind: str, wanted: list[Any], seen: list[Detection]) -> tuple[float, bool]:
    """Largest sum of likenesses over matchings, and whether some matching is exact and obeys the relation."""
    if kind == "count":
        # All wanted objects are alike, so the best matching takes the most similar ones.
        likenesses = sorted((likeness_to(wanted[0], detection) for detection in seen), reverse=True)
        total = sum(likenesses[: len(wanted)])
        return total, total == len(wanted)
    if len(seen) < len(wanted):
        likenesses = [likeness_to(thing, detection) for thing in wanted for detection in seen]
        return max(likenesses, default=0.0), False
    best, obeyed = 0.0, False
    for first, second in permutations(seen, 2):
        likeness = likeness_to(wanted[0], first) + likeness_to(wanted[1], second)
        best = max(best, likeness)
        obeyed = obeyed or (likeness == len(wanted) and relation_holds(kind, first, second))
    return best, obeyed
