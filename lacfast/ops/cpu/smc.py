"""Particles in C++."""

from __future__ import annotations

from torch import Tensor

from lacfast import _C
from lacfast.ops.cpu.addresses import DTYPE_CODES


def particle_arguments(log_weights: Tensor) -> tuple[int, int, int, int]:
    """What every binding takes first, in its order."""
    groups, particles = log_weights.shape
    return groups, particles, DTYPE_CODES[log_weights.dtype], log_weights.data_ptr()


def effective_sample_size(log_weights: Tensor, sizes: Tensor) -> None:
    _C.effective_sample_size(*particle_arguments(log_weights), sizes.data_ptr())


def systematic_resample(
    log_weights: Tensor, steps: Tensor, seed: Tensor, group_ids: Tensor, ancestors: Tensor
) -> None:
    _C.systematic_resample(
        *particle_arguments(log_weights),
        steps.data_ptr(),
        seed.data_ptr(),
        group_ids.data_ptr(),
        ancestors.data_ptr(),
    )
