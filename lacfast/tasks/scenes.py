"""Ground truth of the shapes task: sampling a scene that obeys a prompt and drawing it with numpy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial

import numpy as np

from lacfast.config.checks import unknown
from lacfast.tasks.prompts import SHAPES, Thing, all_prompts
from lacfast.tasks.task import BASE_SIZE, FloatArray, Prompt, Task

# Pixels at scale 1.
CELL_SIZE = BASE_SIZE // 2
OBJECT_SIZE = 12
JITTER = 1
BACKGROUND = 0.5
PALETTE: dict[str, tuple[float, float, float]] = {
    "red": (0.90, 0.15, 0.15),
    "green": (0.15, 0.75, 0.20),
    "blue": (0.15, 0.30, 0.90),
    "yellow": (0.95, 0.85, 0.10),
}
# Sub-samples per pixel and axis of the anti-aliased outline.
_SUPERSAMPLING = 8


@dataclass(frozen=True)
class PlacedObject:
    """One object of a scene: what it is, its cell of the grid and its offset in pixels at scale 1."""

    colour: str
    shape: str
    row: int
    column: int
    shift_y: int = 0
    shift_x: int = 0


@cache
def coverage(shape: str, scale: int = 1) -> FloatArray:
    """Share of every pixel of a cell that a centred shape covers, (S, S), read-only; S = scale CELL_SIZE."""
    size = scale * CELL_SIZE
    axis = (np.arange(size * _SUPERSAMPLING) + 0.5) / _SUPERSAMPLING - size / 2
    y, x = np.meshgrid(axis, axis, indexing="ij")
    half = scale * OBJECT_SIZE / 2
    if shape == "circle":
        inside = x**2 + y**2 <= half**2
    elif shape == "square":
        inside = (np.abs(x) <= half) & (np.abs(y) <= half)
    elif shape == "triangle":
        inside = (np.abs(y) <= half) & (2 * np.abs(x) <= y + half)
    else:
        raise unknown("shape", shape, SHAPES)
    blocks = inside.reshape(size, _SUPERSAMPLING, size, _SUPERSAMPLING)
    result: FloatArray = blocks.mean(axis=(1, 3)).astype(np.float32)
    result.setflags(write=False)
    return result


@cache
def draw_cell(colour: str, shape: str, shift_y: int, shift_x: int, scale: int = 1) -> FloatArray:
    """One cell with one object on the background, (3, S, S) in [0, 1], read-only; S = scale CELL_SIZE."""
    alpha = np.roll(coverage(shape, scale), (scale * shift_y, scale * shift_x), axis=(0, 1))
    paint = np.asarray(PALETTE[colour], dtype=np.float32)[:, None, None]
    background = np.float32(BACKGROUND)
    cell: FloatArray = background + alpha * (paint - background)
    cell.setflags(write=False)
    return cell


def render(scene: Sequence[PlacedObject], scale: int = 1, base_size: int = BASE_SIZE) -> FloatArray:
    """The picture of a scene, (3, H, W) float32 in [0, 1]; H = W = scale base_size."""
    size, cell = scale * base_size, scale * CELL_SIZE
    image = np.full((3, size, size), BACKGROUND, dtype=np.float32)
    for placed in scene:
        top, left = placed.row * cell, placed.column * cell
        image[:, top : top + cell, left : left + cell] = draw_cell(
            placed.colour, placed.shape, placed.shift_y, placed.shift_x, scale
        )
    return image


def _sample_cells(kind: str, number: int, random: np.random.Generator) -> list[tuple[int, int]]:
    """Cells (row, column) of `number` objects, uniform over the placements that obey the kind of prompt."""
    if kind == "left_of":
        return [(int(random.integers(2)), 0), (int(random.integers(2)), 1)]
    if kind == "above":
        return [(0, int(random.integers(2))), (1, int(random.integers(2)))]
    return [divmod(int(cell), 2) for cell in random.permutation(4)[:number]]


def sample_scene(prompt: Prompt, random: np.random.Generator) -> list[PlacedObject]:
    """A random scene that obeys the prompt: uniform placement and jitter."""
    things: list[Thing] = prompt.metadata["objects"]
    cells = _sample_cells(prompt.metadata["kind"], len(things), random)
    scene = []
    for (colour, shape), (row, column) in zip(things, cells, strict=True):
        shift_y, shift_x = random.integers(-JITTER, JITTER + 1, size=2).tolist()
        scene.append(PlacedObject(colour, shape, row, column, shift_y, shift_x))
    return scene


def sample_images(prompts: Sequence[Prompt], random: np.random.Generator, scale: int = 1) -> FloatArray:
    """One ground-truth picture per prompt, (B, 3, H, W) float32 in [0, 1]; H = W = scale BASE_SIZE."""
    return np.stack([render(sample_scene(prompt, random), scale) for prompt in prompts])


def task(scale: int = 1) -> Task:
    """The shapes task with pictures of H = W = scale BASE_SIZE; prompts and scenes are the same."""
    return Task(
        name="shapes" if scale == 1 else f"shapes-{scale * BASE_SIZE}",
        prompts=all_prompts,
        draw=partial(sample_images, scale=scale),
        background=BACKGROUND,
        image_size=scale * BASE_SIZE,
        held_out_per_kind=15,
    )


TASK = task()
