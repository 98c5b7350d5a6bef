"""Ground truth of the shapes task: sampling a scene that obeys a prompt and drawing it with numpy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from lacfast.tasks.prompts import SHAPES, Thing, all_prompts
from lacfast.tasks.task import FloatArray, Prompt, Task

IMAGE_SIZE = 32
CELL_SIZE = 16
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
    """One object of a scene: what it is, its cell of the 2x2 grid and its offset in pixels."""

    colour: str
    shape: str
    row: int
    column: int
    shift_y: int = 0
    shift_x: int = 0


@cache
def coverage(shape: str) -> FloatArray:
    """Share of every pixel of a cell that a centred shape covers, (CELL_SIZE, CELL_SIZE), read-only."""
    samples = CELL_SIZE * _SUPERSAMPLING
    axis = (np.arange(samples) + 0.5) / _SUPERSAMPLING - CELL_SIZE / 2
    y, x = np.meshgrid(axis, axis, indexing="ij")
    half = OBJECT_SIZE / 2
    if shape == "circle":
        inside = x**2 + y**2 <= half**2
    elif shape == "square":
        inside = (np.abs(x) <= half) & (np.abs(y) <= half)
    elif shape == "triangle":
        inside = (np.abs(y) <= half) & (2 * np.abs(x) <= y + half)
    else:
        raise ValueError(f"unknown shape {shape!r}; known: {', '.join(SHAPES)}")
    blocks = inside.reshape(CELL_SIZE, _SUPERSAMPLING, CELL_SIZE, _SUPERSAMPLING)
    result: FloatArray = blocks.mean(axis=(1, 3)).astype(np.float32)
    result.setflags(write=False)
    return result


@cache
def draw_cell(colour: str, shape: str, shift_y: int, shift_x: int) -> FloatArray:
    """One cell with one object on the background, (3, CELL_SIZE, CELL_SIZE) in [0, 1], read-only."""
    alpha = np.roll(coverage(shape), (shift_y, shift_x), axis=(0, 1))
    paint = np.asarray(PALETTE[colour], dtype=np.float32)[:, None, None]
    background = np.float32(BACKGROUND)
    cell: FloatArray = background + alpha * (paint - background)
    cell.setflags(write=False)
    return cell


def render(scene: Sequence[PlacedObject]) -> FloatArray:
    """The picture of a scene, (3, IMAGE_SIZE, IMAGE_SIZE) float32 in [0, 1]."""
    image = np.full((3, IMAGE_SIZE, IMAGE_SIZE), BACKGROUND, dtype=np.float32)
    for placed in scene:
        top, left = placed.row * CELL_SIZE, placed.column * CELL_SIZE
        image[:, top : top + CELL_SIZE, left : left + CELL_SIZE] = draw_cell(
            placed.colour, placed.shape, placed.shift_y, placed.shift_x
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


def sample_images(prompts: Sequence[Prompt], random: np.random.Generator) -> FloatArray:
    """One ground-truth picture per prompt, (B, 3, IMAGE_SIZE, IMAGE_SIZE) float32 in [0, 1]."""
    return np.stack([render(sample_scene(prompt, random)) for prompt in prompts])


TASK = Task(
    name="shapes", prompts=all_prompts, draw=sample_images, background=BACKGROUND, held_out_per_kind=15
)
