"""4. Surrogate of PPO on per-sample numbers (B,): bounds on the policy's move, the gain, means.

`ppo_loss` composes these; the fused kernels do the same for each row.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

Clip = float | tuple[float, float]
"""One clip for both sides, or (low, high)."""


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """How far an update may move one pair, in the units of the op's reduction; inf switches a bound off."""

    clip_low: float = math.inf
    """The ratio counts down to 1 - clip_low where A < 0."""
    clip_high: float = math.inf
    """The ratio counts up to 1 + clip_high where A > 0."""
    dual_clip: float = math.inf
    """The gain is at least dual_clip A where A < 0."""
    kl_threshold: float = math.inf
    """KL from the old policy from which on a pair is dropped that already moves with its advantage."""


def bounds(
    clip_range: Clip | None,
    clip_nats: Clip | None,
    kl_threshold: float | None,
    dual_clip: float,
    *,
    nats_per_unit: float,
) -> Bounds:
    """Bounds from a user's settings, of which exactly one of the first three is given.

    Args:
        clip_range: clip of the ratio, or (low, high), in the units of the reduction.
        clip_nats: the same on the joint ratio, in nats.
        kl_threshold: KL at which the mask begins, in the units of the reduction.
        dual_clip: above 1; inf is off.
        nats_per_unit: N under the mean over N elements, 1 under the sum.

    Raises:
        ValueError: for none or several of the three, or a number out of its range.
    """
    if (clip_range is None) + (clip_nats is None) + (kl_threshold is None) != 2:
        given = {"clip_range": clip_range, "clip_nats": clip_nats, "kl_threshold": kl_threshold}
        raise ValueError(
            "give exactly one of "
            + ", ".join(f"{name}={value}" for name, value in given.items())
            + ": a clip per element, on the joint, or the KL mask"
        )
    if not dual_clip > 1:
        raise ValueError(f"dual_clip is {dual_clip}; it must be above 1 (inf: off, 3 in its paper)")
    if kl_threshold is not None:
        if not kl_threshold > 0:
            raise ValueError(f"kl_threshold is {kl_threshold}; it must be above 0, in mean units near 1e-5")
        return Bounds(dual_clip=float(dual_clip), kl_threshold=float(kl_threshold))
    if clip_range is not None:
        low, high = _clip_pair("clip_range", clip_range, "in mean units near 1e-5 to 1e-4")
    else:
        assert clip_nats is not None
        low, high = _clip_pair("clip_nats", clip_nats, "near 5 nats")
        low, high = low / nats_per_unit, high / nats_per_unit
    return Bounds(clip_low=low, clip_high=high, dual_clip=float(dual_clip))


def _clip_pair(name: str, clip: Clip, usual: str) -> tuple[float, float]:
    low, high = clip if isinstance(clip, tuple) else (clip, clip)
    if not (low > 0 and high > 0):
        raise ValueError(f"{name} is {clip}; it must be above 0, {usual}, or a pair (low, high) of such")
    return float(low), float(high)


def surrogate_gain(
    log_ratio: Tensor, kl_old: Tensor, advantages: Tensor, limits: Bounds
) -> tuple[Tensor, Tensor]:
    """The gain that PPO maximises for each pair, and the side on which a bound stops it.

        gain = min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A),   rho = exp(log_ratio)
        gain = max(gain, dual_clip A)                                  where A < 0
        gain = 0                     where kl_old >= kl_threshold and (rho > 1, A > 0 or rho < 1, A < 0)

    Sources: clip: PPO (arXiv 1707.06347, eq. 7); dual clip: arXiv 1912.09729; KL mask: Flow-DPPO
    (arXiv 2606.11025).

    Args:
        log_ratio: (B,) of new over old probability.
        kl_old: (B,) from the old policy.
        advantages: (B,)
        limits: in the units of the two.

    Returns:
        gain (B,), with gradients, and side (B,): +1 where a bound holds the ratio from above, -1 from
        below, else 0. Where it is not 0, the gradient is 0.
    """
    ratio = log_ratio.exp()
    unclipped = ratio * advantages
    clipped = ratio.clamp(1 - limits.clip_low, 1 + limits.clip_high) * advantages
    gain = torch.minimum(unclipped, clipped)
    positive, negative = advantages > 0, advantages < 0
    high = (ratio > 1 + limits.clip_high) & positive
    low = (ratio < 1 - limits.clip_low) & negative
    if limits.dual_clip < math.inf:
        gain = torch.where(negative, torch.maximum(gain, limits.dual_clip * advantages), gain)
        high = high | ((ratio > limits.dual_clip) & negative)
    if limits.kl_threshold < math.inf:
        far = kl_old.detach() >= limits.kl_threshold
        high = high | (far & (log_ratio > 0) & positive)
        low = low | (far & (log_ratio < 0) & negative)
        gain = torch.where(far & (log_ratio * advantages > 0), 0.0, gain)
    return gain, high.to(ratio.dtype) - low.to(ratio.dtype)


def masked_mean(values: Tensor, mask: Tensor | None) -> Tensor:
    """Mean () of values (B,) over the rows where mask (B,) is True, 0 when there are none; None: all rows."""
    if mask is None:
        return values.mean()
    return torch.where(mask, values, 0.0).sum() / mask.sum().clamp(min=1)


def sums_per_step(rows: Tensor, steps: Tensor, mask: Tensor | None, num_steps: int) -> Tensor:
    """Sums of the pairs' statistics over the pairs of each step.

    Args:
        rows: (B, 4) log_ratio, kl_old, kl_ref, side of the bound.
        steps: (B,) int64 below `num_steps`.
        mask: (B,) bool, rows that count. None: all.
        num_steps: T.

    Returns:
        (T, 6) count, log_ratio, kl_old, kl_ref, clipped from above, clipped from below.
    """
    side = rows[:, 3]
    counted = torch.ones_like(side) if mask is None else mask.to(rows.dtype)
    columns = torch.stack([counted, *rows[:, :3].unbind(1), (side > 0).to(rows), (side < 0).to(rows)], dim=1)
    return columns.new_zeros(num_steps, 6).index_add(0, steps, columns)
