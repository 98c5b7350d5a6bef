"""6. Particles: how many of them still count, and which survive."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lacfast.records import NoiseKey
from lacfast.reference.noise import philox
from lacfast.reference.transition import arithmetic_dtype

WEIGHT_BITS = 36
"""Resampling counts a group's weights in units of 2^-36 of the largest."""
RESAMPLING_QUAD = 0xFFFFFFFF
"""First word of a resampling's Philox counter; a latent's noise would reach it after 2^34 elements."""
LOG2_E = 1.4426950408889634
LN_2_HIGH = 6.93147180369123816490e-01
"""ln 2 to 32 bits, so that a small multiple is exact; the rest follows."""
LN_2_LOW = 1.90821492927058770002e-10
EXP_TAYLOR = tuple(1 / math.factorial(n) for n in range(12, -1, -1))


def effective_sample_size(log_weights: Tensor) -> Tensor:
    """Effective sample size (sum w)^2 / sum w^2 of groups of particles (Kong et al., JASA 1994).

    Args:
        log_weights: (G, N) unnormalised. -inf and NaN weigh nothing.

    Returns:
        (G,) between 1 and N; 0 where nothing has a weight. float64 for float64, else float32.
    """
    below_max, _ = _below_maximum(log_weights)
    weights = below_max.exp()
    squares = weights.square().sum(dim=1)
    size = weights.sum(dim=1).square() / torch.where(squares > 0, squares, 1.0)
    return size.to(arithmetic_dtype(log_weights))


def systematic_resample(log_weights: Tensor, steps: Tensor, key: NoiseKey) -> Tensor:
    """Ancestors of N new particles per group by one uniform number each (Kitagawa, JCGS 1996).

        ancestor_i = first j with  w_1 + .. + w_j > (i + u) / N sum w

    in integers: w = floor(2^36 exp(log w - max)), u = (2 (word >> 8) + 1) / 2^25 with the first Philox word
    at counter (0xFFFFFFFF, step, group id low, group id high).

    Args:
        log_weights: (G, N) unnormalised. -inf and NaN are never chosen; without any weight all stay.
        steps: (G,) int64.
        key: seed (1,) and group ids (G,).

    Returns:
        (G, N) int64, ascending.
    """
    particles = log_weights.shape[1]
    below_max, has_weight = _below_maximum(log_weights)
    # Without any weight all are equal, and equal weights keep every particle.
    weights = _integer_weights(torch.where(has_weight, below_max, 0.0))
    cumulative = weights.cumsum(dim=1)
    mask = 0xFFFFFFFF
    ids = key.sample_ids
    quads = torch.full_like(ids, RESAMPLING_QUAD)
    counter = torch.stack([quads, steps & mask, ids & mask, (ids >> 32) & mask], dim=-1)
    words = philox(counter, torch.cat([key.seed & mask, (key.seed >> 32) & mask]))
    uniform = 2 * (words[:, :1] >> 8) + 1
    # floor((i + u) total / N) by quotient and remainder: no product needs more than 62 bits.
    quotient = cumulative[:, -1:] // particles
    remainder = cumulative[:, -1:] % particles
    index = torch.arange(particles, device=ids.device)
    share = uniform * quotient
    rest = (share & (2**25 - 1)) * particles + (index * 2**25 + uniform) * remainder
    positions = index * quotient + (share >> 25) + rest // (particles * 2**25)
    return torch.searchsorted(cumulative, positions, right=True)


def _below_maximum(log_weights: Tensor) -> tuple[Tensor, Tensor]:
    """log w - max in float64 (0 at the maximum, be it infinite), and (G, 1) whether there is any weight."""
    wide = log_weights.double()
    wide = torch.where(wide.isnan(), -math.inf, wide)
    maximum = wide.amax(dim=1, keepdim=True)
    has_weight = maximum > -math.inf
    below = torch.where((wide == maximum) & has_weight, 0.0, wide - maximum)
    return torch.where(below.isnan(), -math.inf, below), has_weight


def _integer_weights(x: Tensor) -> Tensor:
    """floor(2^36 exp(x)) for x <= 0, by additions and multiplications that every processor rounds alike."""
    # exp(-40) 2^36 < 1
    bounded = x.clamp(min=-40.0)
    exponent = torch.round(bounded * LOG2_E)
    remainder = (bounded - exponent * LN_2_HIGH) - exponent * LN_2_LOW
    polynomial = torch.full_like(remainder, EXP_TAYLOR[0])
    for coefficient in EXP_TAYLOR[1:]:
        polynomial = polynomial * remainder + coefficient
    scaled = (polynomial * 2**WEIGHT_BITS).to(torch.int64)
    return torch.bitwise_right_shift(scaled, (-exponent).to(torch.int64))
