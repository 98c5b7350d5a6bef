"""A gauge of drift: how far the ground of a picture is from the colour that a task's own pictures have there.

Checkers look at objects and let the ground pass, so that a policy may drift there and no score tells.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from lacfast.tasks.task import BASE_SIZE

INK = 0.2
"""Distance from the ground in one channel, in [0, 1], beyond which a pixel is of an object: a codec's ripple
lies below it, half of any object's colour above."""
MARGIN = 2
"""Pixels at scale 1 around an object that are not counted, for the codec ripples at an edge. With more of
them pictures of four objects would have no ground."""


def background_distance(images: Tensor, ground: float) -> Tensor:
    """Root mean square distance (B,) in [0, 1] of the empty pixels of images (B, 3, H, W) from their ground.

    Empty is what lies further than MARGIN from all ink, and ink is what differs from the ground by more than
    INK. A picture without an empty pixel has INK, the most that one with some can have.
    """
    pixels = images.detach().to("cpu", torch.float32)
    margin = MARGIN * max(pixels.shape[-1] // BASE_SIZE, 1)
    distances = (pixels - ground).abs()
    ink = (distances.amax(dim=1, keepdim=True) > INK).float()
    empty = 1 - functional.max_pool2d(ink, 2 * margin + 1, stride=1, padding=margin)
    count = empty.sum(dim=(1, 2, 3))
    squared = (distances.square().mean(dim=1, keepdim=True) * empty).sum(dim=(1, 2, 3))
    return torch.where(count > 0, (squared / count.clamp(min=1)).sqrt(), INK)
