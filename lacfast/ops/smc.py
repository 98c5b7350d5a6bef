"""Particles of sequential Monte Carlo: how many still count, and which survive."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lacfast import reference
from lacfast.ops.checks import check_first, check_operand
from lacfast.ops.op import Op, Sized
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
    chosen = EFFECTIVE_SAMPLE_SIZE.chosen(log_weights)
    if chosen == "reference":
        return reference.effective_sample_size(log_weights.detach())
    return EFFECTIVE_SAMPLE_SIZE(chosen, EffectiveSampleSize(log_weights)).sizes


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
    chosen = SYSTEMATIC_RESAMPLE.chosen(log_weights)
    if chosen == "reference":
        return reference.systematic_resample(log_weights.detach(), steps, key)
    inputs = SystematicResample(log_weights, steps, key.seed, key.sample_ids)
    return SYSTEMATIC_RESAMPLE(chosen, inputs).ancestors


def _check(log_weights: Tensor) -> None:
    if log_weights.ndim != 2 or 0 in log_weights.shape or log_weights.shape[1] > MAX_PARTICLES:
        raise ValueError(
            f"log_weights has shape {tuple(log_weights.shape)}; "
            f"it must be (G, N) with N from 1 to {MAX_PARTICLES}"
        )
    check_first("log_weights", log_weights, (torch.float32, torch.float64))


class EffectiveSampleSize(NamedTuple):
    log_weights: Sized


class EffectiveSampleSizeOutputs(NamedTuple):
    sizes: Tensor


class SystematicResample(NamedTuple):
    log_weights: Sized
    steps: Tensor
    seed: Tensor
    group_ids: Tensor


class SystematicResampleOutputs(NamedTuple):
    ancestors: Tensor


def _sizes(inputs: EffectiveSampleSize) -> EffectiveSampleSizeOutputs:
    return EffectiveSampleSizeOutputs(inputs.log_weights.new_empty(inputs.log_weights.shape[0]))


def _ancestors(inputs: SystematicResample) -> SystematicResampleOutputs:
    log_weights = inputs.log_weights
    return SystematicResampleOutputs(log_weights.new_empty(log_weights.shape, dtype=torch.int64))


EFFECTIVE_SAMPLE_SIZE = Op(
    "effective_sample_size", EffectiveSampleSize, EffectiveSampleSizeOutputs, _sizes, cuda=True
)
SYSTEMATIC_RESAMPLE = Op(
    "systematic_resample", SystematicResample, SystematicResampleOutputs, _ancestors, cuda=True
)
