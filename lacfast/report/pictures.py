"""Pictures of a run: the same prompts and noise before and after, as grids and side by side with verdicts."""

from __future__ import annotations

import base64
import io
import json
import os
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

GRID_COLUMNS = 10
GRID_IMAGES = 60
FRAMES_PER_SECOND = 16
"""Rate at which videos play: Wan's."""
SCALE = 3
"""Screen pixels per pixel of a tiny image."""
PROMPTS = "lacfast prompts"
"""What a grid's PNG file holds its prompts under."""
GREEN, RED = "#1a7f37", "#cf222e"


@dataclass(frozen=True)
class Gallery:
    """Images of the same prompts from several models, and what the checker says of each."""

    prompts: list[str]
    columns: dict[str, tuple[Tensor, Tensor]]
    """title -> images (n, 3, H, W) in [0, 1] and verdicts (n,) 0 or 1."""
    stride: int = 1
    """Every stride-th prompt is shown."""
    shown: int = 12
    """Most prompts that are shown one by one."""

    @property
    def rows(self) -> list[int]:
        """The prompts that are shown."""
        return list(range(0, len(self.prompts), self.stride))[: self.shown]


def to_image(pixels: Tensor, scale: int = 1) -> Image.Image:
    """(3, H, W) in [0, 1] as a picture, every pixel `scale` pixels wide."""
    levels = (pixels.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).contiguous().numpy()
    return Image.fromarray(levels.repeat(scale, axis=0).repeat(scale, axis=1))


def png_data_uri(image: Image.Image) -> str:
    """The picture as a data: address, so that a page needs no other file."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def grid(images: Tensor, *, columns: int = GRID_COLUMNS, scale: int = SCALE, gap: int = 2) -> Image.Image:
    """Images (n, 3, H, W) row by row; the ground shows through, white where there is none."""
    count, _, height, width = images.shape
    rows = -(-count // columns)
    step_y, step_x = height * scale + gap, width * scale + gap
    sheet = np.full((rows * step_y + gap, min(columns, count) * step_x + gap, 4), 255, dtype=np.uint8)
    sheet[..., 3] = 0
    for index in range(count):
        row, column = divmod(index, columns)
        top, left = gap + row * step_y, gap + column * step_x
        cell = sheet[top : top + height * scale, left : left + width * scale]
        cell[..., :3], cell[..., 3] = np.asarray(to_image(images[index], scale)), 255
    return Image.fromarray(sheet)


def contact_sheet(images: Tensor) -> Image.Image:
    """The first GRID_IMAGES of images (n, 3, H, W), small ones enlarged; videos (n, F, 3, H, W) are rows."""
    scale = max(1, 96 // images.shape[-1])
    shown = images[: shown_in_sheet(images)]
    if images.ndim == 4:
        return grid(shown, scale=scale)
    return grid(shown.flatten(0, 1), columns=images.shape[1], scale=scale)


def shown_in_sheet(images: Tensor) -> int:
    """How many of the images, or videos, a contact sheet has room for."""
    return GRID_IMAGES if images.ndim == 4 else max(GRID_IMAGES // images.shape[1], 1)


def save_sample(pixels: Tensor, path: Path) -> Path:
    """Write an image (3, H, W) as a PNG file, or a video (F, 3, H, W) as a WebP that plays.

    Args:
        pixels: in [0, 1].
        path: without its suffix.

    Returns:
        The path with it.
    """
    if pixels.ndim == 3:
        path = path.with_suffix(".png")
        to_image(pixels).save(path)
        return path
    path = path.with_suffix(".webp")
    first, *others = (to_image(frame) for frame in pixels)
    first.save(path, save_all=True, append_images=others, duration=1000 // FRAMES_PER_SECOND, loop=0)
    return path


def save_with_prompts(picture: Image.Image, path: Path, prompts: Sequence[str]) -> None:
    """Save a PNG that holds the prompts of its images, row by row; who reads it meets a whole one."""
    about = PngInfo()
    about.add_itxt(PROMPTS, json.dumps(list(prompts)))
    partial = path.with_name(f".{path.name}.partial")
    picture.save(partial, format="PNG", pnginfo=about)
    os.replace(partial, path)


def prompts_of(picture: Image.Image) -> list[str]:
    """The prompts that a picture holds; none of another program's or an earlier version's."""
    text = getattr(picture, "text", {}).get(PROMPTS, "[]")
    return [str(prompt) for prompt in json.loads(text)]


def comparison(gallery: Gallery) -> Figure:
    """One column per shown prompt, one row per model, a green or red frame for the checker's verdict."""
    rows = gallery.rows
    figure = Figure(
        figsize=(1.05 * len(rows) + 0.7, 1.2 * len(gallery.columns) + 0.6), dpi=96, layout="constrained"
    )
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(gallery.columns), len(rows), squeeze=False)
    for axis_row, (title, (images, verdicts)) in zip(axes, gallery.columns.items(), strict=True):
        for axis, index in zip(axis_row, rows, strict=True):
            colour, mark = (GREEN, "✓") if verdicts[index] > 0.5 else (RED, "✗")
            axis.imshow(to_image(images[index]), interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            axis.set_xlabel(mark, color=colour, fontsize=10, labelpad=0)
            for spine in axis.spines.values():
                spine.set(edgecolor=colour, linewidth=2)
        axis_row[0].set_ylabel(title.replace(", ", ",\n"), fontsize=9)
    for axis, index in zip(axes[0], rows, strict=True):
        # A prompt with two dollar signs is no formula.
        axis.set_title("\n".join(textwrap.wrap(gallery.prompts[index], 16)), fontsize=7.5, parse_math=False)
    return figure


def save_pictures(gallery: Gallery, directory: Path) -> None:
    """A grid of the first images per model, and the comparison, as PNG files."""
    directory.mkdir(parents=True, exist_ok=True)
    for title, (images, _) in gallery.columns.items():
        grid(images[:GRID_IMAGES]).save(directory / f"{title.replace(', ', '_')}.png")
    comparison(gallery).savefig(directory / "comparison.png")
