"""Videos before rewards: the frames that a reward of images judges, and what becomes of their scores."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor

Entry = TypeVar("Entry")

JUDGED_FRAMES = 3
"""Frames that rewards of images judge where nothing is said: the first, the middle and the last one."""


def is_video(images: Tensor) -> bool:
    """Whether these are videos (B, F, 3, H, W) and no images (B, 3, H, W)."""
    return images.ndim == 5


def judged_places(total: int, count: int) -> list[int]:
    """Places of `count` of `total` frames, evenly spaced from the first to the last; of one the middle."""
    if count == 1:
        return [total // 2]
    return torch.linspace(0, total - 1, min(count, total)).round().int().tolist()


def judged_frames(videos: Tensor, count: int) -> Tensor:
    """(B, count, 3, H, W) of videos (B, F, 3, H, W); images (B, 3, H, W) are themselves."""
    return videos[:, judged_places(videos.shape[1], count)] if is_video(videos) else videos


def repeated(entries: list[Entry], count: int) -> list[Entry]:
    """Each entry `count` times, as frames that follow each other have it."""
    return [entry for entry in entries for _ in range(count)]
