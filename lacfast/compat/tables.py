"""What a scheduler's steps need, computed once per schedule: a step then reads device tables, not the host.

A table is kept as long as the scheduler's own tensor lives and is unchanged; `set_timesteps` makes new ones.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

Value = TypeVar("Value")


class ScheduleCache(Generic[Value]):
    """Values that depend on a scheduler's tensor and a few settings."""

    def __init__(self) -> None:
        self._kept: Any = WeakTensorKeyDictionary()

    def get(self, tensor: Tensor, settings: Hashable, build: Callable[[], Value]) -> Value:
        """The value made by `build` for this tensor's contents and `settings`; built at the first call."""
        # Schedules made under inference_mode carry no version counter and cannot be written to outside of it.
        version = -1 if tensor.is_inference() else tensor._version
        kept: dict[Hashable, Value] = self._kept.get(tensor) or {}
        key = (version, settings)
        if key not in kept:
            # A table that is an inference tensor could not be saved for a backward pass later.
            with torch.inference_mode(False), torch.no_grad():
                kept[key] = build()
            self._kept[tensor] = kept
        return kept[key]


def with_unknown_row(rows: Tensor) -> Tensor:
    """(T, 3) rows a, b, std and a last one that turns whatever reads it into NaN.

    Steps that no row fits point there: on a GPU a wrong timestep can be marked without a synchronisation,
    but not raised.
    """
    return torch.cat([rows, torch.tensor([[float("nan"), float("nan"), 1.0]], dtype=rows.dtype)])


def require_known(steps: Tensor, unknown: int, message: Callable[[], str]) -> Tensor:
    """`steps` (B,) int64, checked where that needs no synchronisation.

    Raises:
        ValueError: with `message()`, when a step on the CPU is the `unknown` row.
    """
    if steps.device.type == "cpu" and bool((steps == unknown).any()):
        raise ValueError(message())
    return steps


def per_sample(steps: Tensor, batch: int) -> Tensor:
    """Steps (B,) for a batch, from one step for all or one per sample.

    Raises:
        ValueError: for another number of timesteps.
    """
    if len(steps) not in (1, batch):
        raise ValueError(f"got {len(steps)} timesteps for {batch} samples; pass one, or one per sample")
    return steps if len(steps) == batch else steps.expand(batch).contiguous()
