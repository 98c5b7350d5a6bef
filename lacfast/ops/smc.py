"""Particles of sequential Monte Carlo: how many still count, and which survive."""

from __future__ import annotations

import torch
from torch import Tensor

from lacfast import reference
from lacfast.ops.backend import choose, launch, through_dispatcher
from lacfast.ops.checks import check_operand
from lacfast.records import NoiseKey

MAX_PARTICLES = 4096
"""Per group: the kernels keep a group in shared memory, and their integers have room for no more."""


def effective_sample_size(log_weights: Tensor) -> Tensor:
    """Effective number of particles per group (Kong et al., JASA 1994), from logarithms of any size.

        ESS = (sum w)^2 / sum w^2,   w = exp(log_weights - max)

    No gradient. The decision to resample needs no look at it on the host:
    `torch.where((ess < N / 2)[:, None], systematic_resample(...), torch.arange(N))`.

    Args:
        log_weights: (G, N) unnormalised, float32 or float64. -inf and NaN weigh nothing.

    Returns:
        (G,) in the same dtype, between 1 and N; 0 where nothing has a weight.

    Raises:
        ValueError: a shape, dtype or memory order that does not fit.
    """
    _check(log_weights)
    chosen = choose("effective_sample_size", log_weights.device.type, torch.float32)
    if chosen == "reference":
        return reference.effective_sample_size(log_weights.detach())
    if through_dispatcher(log_weights):
        sizes: Tensor = _effective_sample_size_op(log_weights)
        return sizes
    return _size(chosen, log_weights)


def systematic_resample(log_weights: Tensor, steps: Tensor, key: NoiseKey) -> Tensor:
    """Ancestors of N new particles per group by one uniform number each (Kitagawa, JCGS 1996).

        ancestor_i = first j with  w_1 + .. + w_j > (i + u) / N sum w,   i = 0 .. N - 1

    A particle of weight w (normalised) gets floor(N w) or ceil(N w) children, N w on average over seeds;
    equal weights keep every particle in its place. Weights are integers in units of 2^-36 of the group's
    largest, so the ancestors are the same on every backend, bit for bit. u has 24 random bits of Philox at
    the counter (0xFFFFFFFF, step, group id), which no latent's noise uses: `key` may be the noise's own.

    Args:
        log_weights: (G, N) unnormalised, float32 or float64, N up to 4096. -inf and NaN are never chosen; a
            group without any weight stays as it is.
        steps: (G,) int64 denoising step.
        key: seed (1,) and group ids (G,), int64.

    Returns:
        (G, N) int64 index within the group, ascending.

    Raises:
        ValueError: a shape, dtype, device or memory order that does not fit.
    """
    _check(log_weights)
    per_group = (log_weights.shape[:1], (torch.int64,))
    check_operand("steps", steps, "log_weights", log_weights, *per_group)
    check_operand("key.seed", key.seed, "log_weights", log_weights, (1,), (torch.int64,))
    check_operand("key.sample_ids", key.sample_ids, "log_weights", log_weights, *per_group)
    chosen = choose("systematic_resample", log_weights.device.type, torch.float32)
    if chosen == "reference":
        return reference.systematic_resample(log_weights.detach(), steps, key)
    if through_dispatcher(log_weights):
        ancestors: Tensor = _systematic_resample_op(log_weights, steps, key.seed, key.sample_ids)
        return ancestors
    return _ancestors(chosen, log_weights, steps, key.seed, key.sample_ids)


def _check(log_weights: Tensor) -> None:
    if log_weights.ndim != 2 or 0 in log_weights.shape or log_weights.shape[1] > MAX_PARTICLES:
        raise ValueError(
            f"log_weights has shape {tuple(log_weights.shape)}; "
            f"it must be (G, N) with N from 1 to {MAX_PARTICLES}"
        )
    dtypes = (torch.float32, torch.float64)
    check_operand("log_weights", log_weights, "log_weights", log_weights, log_weights.shape, dtypes)


def _size(chosen: str, log_weights: Tensor) -> Tensor:
    sizes = log_weights.new_empty(log_weights.shape[0])
    launch(chosen, "effective_sample_size", log_weights, log_weights, sizes)
    return sizes


def _ancestors(chosen: str, log_weights: Tensor, steps: Tensor, seed: Tensor, group_ids: Tensor) -> Tensor:
    ancestors = log_weights.new_empty(log_weights.shape, dtype=torch.int64)
    launch(chosen, "systematic_resample", log_weights, log_weights, steps, seed, group_ids, ancestors)
    return ancestors


@torch.library.custom_op("lacfast::effective_sample_size", mutates_args=())
def _effective_sample_size_op(log_weights: Tensor) -> Tensor:
    return _size(choose("effective_sample_size", log_weights.device.type, torch.float32), log_weights)


@_effective_sample_size_op.register_fake
def _(log_weights: Tensor) -> Tensor:
    return log_weights.new_empty(log_weights.shape[0])


@torch.library.custom_op("lacfast::systematic_resample", mutates_args=())
def _systematic_resample_op(log_weights: Tensor, steps: Tensor, seed: Tensor, group_ids: Tensor) -> Tensor:
    chosen = choose("systematic_resample", log_weights.device.type, torch.float32)
    return _ancestors(chosen, log_weights, steps, seed, group_ids)


@_systematic_resample_op.register_fake
def _(log_weights: Tensor, steps: Tensor, seed: Tensor, group_ids: Tensor) -> Tensor:
    return log_weights.new_empty(log_weights.shape, dtype=torch.int64)
