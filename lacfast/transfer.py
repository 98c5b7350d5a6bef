"""Copies from host to device that the host does not wait for."""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device | str, dtype: torch.dtype | None = None) -> Tensor:
    """`tensor` on a device and in a dtype; itself where nothing changes.

    To a GPU it goes through pinned memory: a copy from any other makes the host wait for all queued work.
    """
    place = torch.device(device)
    if place.type != "cuda" or tensor.is_cuda:
        return tensor.to(place, dtype)
    return tensor.to(dtype=dtype).pin_memory().to(place, non_blocking=True)


def to_like(tensor: Tensor, other: Tensor) -> Tensor:
    """`tensor` on the device and in the dtype of another one."""
    return to_device(tensor, other.device, other.dtype)
