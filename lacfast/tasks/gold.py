"""The gold checker, of another design: every cell is compared with all pictures of a cell, no components."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from lacfast.tasks.predicates import Detection, scores
from lacfast.tasks.prompts import COLOURS, SHAPES, Thing
from lacfast.tasks.scenes import BACKGROUND, CELL_SIZE, JITTER, draw_cell
from lacfast.tasks.task import BASE_SIZE, FloatArray, scale_of

MAX_DISTANCE = 0.12
"""Root mean square distance in colour to the nearest prototype above which a cell shows something unknown."""


@cache
def _prototypes(scale: int) -> tuple[list[Thing | None], FloatArray]:
    """What every prototype shows (None: empty) and its picture, (P, 3 * S * S) with S = scale CELL_SIZE."""
    size = scale * CELL_SIZE
    shifts = range(-JITTER, JITTER + 1)
    names: list[Thing | None] = [None]
    pictures = [np.full((3, size, size), BACKGROUND, dtype=np.float32)]
    for colour in COLOURS:
        for shape in SHAPES:
            for shift_y in shifts:
                for shift_x in shifts:
                    names.append((colour, shape))
                    pictures.append(draw_cell(colour, shape, shift_y, shift_x, scale))
    return names, np.stack(pictures).reshape(len(pictures), -1)


def detect(images: FloatArray, base_size: int = BASE_SIZE) -> list[list[Detection]]:
    """The objects of every image (B, 3, H, W): the nearest prototype of each cell.

    H = W = base_size at scale 1, a whole number of cells.
    """
    scale = scale_of(images, base_size)
    names, prototypes = _prototypes(scale)
    grid, size = base_size // CELL_SIZE, scale * CELL_SIZE
    cells = images.reshape(-1, 3, grid, size, grid, size).transpose(0, 2, 4, 1, 3, 5)
    cells = cells.reshape(-1, prototypes.shape[1])
    squared = (cells**2).sum(1)[:, None] + (prototypes**2).sum(1) - 2 * cells @ prototypes.T
    nearest = squared.argmin(axis=1)
    distance = np.sqrt(np.maximum(squared.min(axis=1), 0) / prototypes.shape[1])
    found: list[list[Detection]] = [[] for _ in images]
    for cell, (prototype, far) in enumerate(zip(nearest, distance > MAX_DISTANCE, strict=True)):
        image, row, column = cell // grid**2, cell % grid**2 // grid, cell % grid
        name = names[prototype]
        if name is None and not far:
            continue
        colour, shape = ("", "") if far or name is None else name
        found[image].append(Detection(colour, shape, (row + 0.5) * size, (column + 0.5) * size))
    return found


def check(images: FloatArray, metadata: list[dict[str, Any]]) -> tuple[FloatArray, FloatArray]:
    """Strict (0 or 1) and partial ([0, 1]) score per image, as `lacfast.tasks.checker.check`."""
    return scores(detect(images), metadata)
