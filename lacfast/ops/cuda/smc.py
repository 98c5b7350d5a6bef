"""Particles in CUDA C++, one block per group."""

from __future__ import annotations

from torch import Tensor

from lacfast import _C
from lacfast.ops.cpu.smc import particle_arguments
from lacfast.ops.cuda.stream import current_stream


def effective_sample_size(log_weights: Tensor, sizes: Tensor) -> None:
    _C.cuda_effective_sample_size(
        *particle_arguments(log_weights), sizes.data_ptr(), current_stream(log_weights)
    )


def systematic_resample(
    log_weights: Tensor, steps: Tensor, seed: Tensor, group_ids: Tensor, ancestors: Tensor
) -> None:
    _C.cuda_systematic_resample(
        *particle_arguments(log_weights),
        steps.data_ptr(),
        seed.data_ptr(),
        group_ids.data_ptr(),
        ancestors.data_ptr(),
        current_stream(log_weights),
    )
