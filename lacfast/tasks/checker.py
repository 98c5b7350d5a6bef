"""The rule-based checker: saturation mask, connected components, majority hue, shape by template overlap."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from lacfast.tasks.predicates import Detection, scores
from lacfast.tasks.prompts import COLOURS, SHAPES
from lacfast.tasks.scenes import CELL_SIZE, PALETTE, coverage
from lacfast.tasks.task import BASE_SIZE, FloatArray, scale_of

SATURATION_THRESHOLD = 0.3
"""max - min of the channels above which a pixel belongs to an object: about half of the palette's own."""
MIN_AREA = 10
"""Pixels at scale 1 below which a component is a speck and no object."""
MIN_OVERLAP = 0.7
"""Intersection over union with the best template below which the shape is unknown."""
MIN_MAJORITY = 0.7
"""Share of a component's pixels that must have its hue, or its colour is unknown."""
# Connects within an image and never between the images of a batch.
_IN_PLANE = np.stack([np.zeros((3, 3), int), ndimage.generate_binary_structure(2, 1), np.zeros((3, 3), int)])

IntArray = npt.NDArray[np.int64]


@cache
def _templates(scale: int) -> FloatArray:
    """Binary masks of every shape at nine alignments, (len(SHAPES), 9, S * S) with S = scale CELL_SIZE."""
    shifts = [(dy, dx) for dy in (-scale, 0, scale) for dx in (-scale, 0, scale)]
    masks = [[np.roll(coverage(shape, scale) > 0.5, shift, (0, 1)) for shift in shifts] for shape in SHAPES]
    return np.asarray(masks, dtype=np.float32).reshape(len(SHAPES), len(shifts), -1)


def _chroma(rgb: FloatArray) -> FloatArray:
    """Colour without its grey part, channels first: the mean of the channels removed, length one."""
    centred = rgb - rgb.mean(axis=0, keepdims=True)
    return np.asarray(centred / (np.linalg.norm(centred, axis=0, keepdims=True) + 1e-6), dtype=np.float32)


def _component_shapes(
    labels: IntArray, boxes: list[tuple[slice, slice, slice]], kept: IntArray, scale: int
) -> npt.NDArray[np.str_]:
    """The shape of every kept component by its best overlap with a template, "" below MIN_OVERLAP."""
    size = scale * CELL_SIZE
    crops = np.zeros((len(kept), size, size), dtype=np.float32)
    fits = np.zeros(len(kept), dtype=bool)
    for row, component in enumerate(kept):
        box = boxes[component]
        mask = labels[box][0] == component + 1
        height, width = mask.shape
        if height > size or width > size:
            continue
        top, left = (size - height) // 2, (size - width) // 2
        crops[row, top : top + height, left : left + width] = mask
        fits[row] = True
    flat = crops.reshape(len(kept), 1, 1, -1)
    templates = _templates(scale)
    intersection = np.einsum("kd,sad->ksa", flat[:, 0, 0], templates, optimize=True)
    union = flat.sum(-1) + templates.sum(-1)[None] - intersection
    overlap = (intersection / union).max(axis=-1)
    known = fits & (overlap.max(axis=-1) >= MIN_OVERLAP)
    return np.where(known, np.asarray(SHAPES)[overlap.argmax(axis=-1)], "")


def _component_colours(images: FloatArray, labels: IntArray, number: int) -> npt.NDArray[np.str_]:
    """The hue that most pixels of every component have, "" where no hue has MIN_MAJORITY."""
    inside = labels > 0
    palette = _chroma(np.asarray([PALETTE[colour] for colour in COLOURS], dtype=np.float32).T)
    hue = (palette.T @ _chroma(images.transpose(1, 0, 2, 3)[:, inside])).argmax(axis=0)
    votes = np.bincount((labels[inside] - 1) * len(COLOURS) + hue, minlength=number * len(COLOURS))
    votes = votes.reshape(number, len(COLOURS))
    known = votes.max(axis=1) >= MIN_MAJORITY * votes.sum(axis=1)
    return np.where(known, np.asarray(COLOURS)[votes.argmax(axis=1)], "")


def detect(images: FloatArray, base_size: int = BASE_SIZE) -> list[list[Detection]]:
    """The objects of every image (B, 3, H, W), as connected components of saturated pixels.

    H = W = base_size at scale 1.
    """
    scale = scale_of(images, base_size)
    saturation = images.max(axis=1) - images.min(axis=1)
    labels, number = ndimage.label(saturation > SATURATION_THRESHOLD, structure=_IN_PLANE)
    found: list[list[Detection]] = [[] for _ in images]
    areas = np.bincount(labels.ravel(), minlength=number + 1)[1:]
    kept = np.flatnonzero(areas >= MIN_AREA * scale**2)
    if len(kept) == 0:
        return found
    boxes = ndimage.find_objects(labels)
    shapes = _component_shapes(labels, boxes, kept, scale)
    colours = _component_colours(images, labels, number)[kept]
    for component, colour, shape in zip(kept, colours, shapes, strict=True):
        image, rows, columns = boxes[component]
        y, x = (rows.start + rows.stop) / 2, (columns.start + columns.stop) / 2
        found[image.start].append(Detection(str(colour), str(shape), y, x))
    return found


def check(images: FloatArray, metadata: list[dict[str, Any]]) -> tuple[FloatArray, FloatArray]:
    """Strict (0 or 1) and partial ([0, 1]) score per image.

    Args:
        images: (B, 3, H, W) in [0, 1], H = W a multiple of BASE_SIZE.
        metadata: B dictionaries as in `Prompt.metadata`.
    """
    return scores(detect(images), metadata)
