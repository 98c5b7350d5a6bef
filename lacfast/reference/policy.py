"""4. Ratio and loss: PPO in innovation form."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lacfast.config import RATIOS
from lacfast.config.checks import unknown
from lacfast.records import NoiseKey, PPOStats, TransitionTerms
from lacfast.reference.noise import noise_for
from lacfast.reference.surrogate import Clip, bounds, masked_mean, sums_per_step, surrogate_gain
from lacfast.reference.transition import arithmetic_dtype, reduce, rows_of


def log_ratio(
    model_output: Tensor,
    old_model_output: Tensor,
    coefficients: Tensor,
    steps: Tensor,
    *,
    noise: Tensor | NoiseKey,
    anchor_output: Tensor | None = None,
    reduction: str = "mean",
) -> TransitionTerms:
    """Log of the new over the old transition probability, from the noise that was drawn.

    The old policy made x' = a x + b v_old + std eps, so with dv = v - v_old
        log_ratio = reduce( eps b dv / std - (b dv)^2 / (2 std^2) )
        kl_old    = reduce( (b dv)^2 / (2 std^2) )
        kl_ref    = reduce( (b (v - v_ref))^2 / (2 std^2) )
    It needs neither x nor x', is exactly 0 when v = v_old in any storage dtype, and keeps its precision
    where the difference of two log-probs has none. All three are 0 where std = 0.

    Args:
        model_output: (B, ...) v, of the policy that is trained; gradients flow to it alone.
        old_model_output: (B, ...) v_old, of the policy that made the rollout.
        coefficients: (T, 3) columns a, b, std.
        steps: (B,) int64 row of `coefficients`.
        noise: (B, ...) eps of the rollout, or the key that it was drawn from.
        anchor_output: (B, ...) v_ref, of the anchor. None: kl_ref is 0.
        reduction: "mean" over elements or "sum".
    """
    dtype = arithmetic_dtype(model_output)
    _, b, std = rows_of(coefficients, steps, model_output)
    stochastic = std > 0
    gain = torch.where(stochastic, b / torch.where(stochastic, std, 1.0), 0.0)
    eps = torch.where(stochastic, noise_for(model_output, steps, noise).to(dtype), 0.0)
    shift = gain * torch.where(stochastic, _difference(model_output, old_model_output), 0.0)
    kl_old = reduce(shift**2 / 2, reduction)
    ratio_terms = reduce(eps * shift - shift**2 / 2, reduction)
    if anchor_output is None:
        return TransitionTerms(ratio_terms, kl_old, torch.zeros_like(kl_old))
    shift_ref = gain * torch.where(stochastic, _difference(model_output, anchor_output), 0.0)
    return TransitionTerms(ratio_terms, kl_old, reduce(shift_ref**2 / 2, reduction))


def _difference(model_output: Tensor, fixed_output: Tensor) -> Tensor:
    dtype = arithmetic_dtype(model_output)
    return model_output.to(dtype) - fixed_output.detach().to(dtype)


def _normalized_log_ratio(
    model_output: Tensor,
    old_model_output: Tensor,
    coefficients: Tensor,
    steps: Tensor,
    noise: Tensor | NoiseKey,
    reduction: str,
) -> Tensor:
    """reduce( eps b dv ): RatioNorm of GRPO-Guard (arXiv 2510.22319), the same spread at every step."""
    _, b, std = rows_of(coefficients, steps, model_output)
    eps = noise_for(model_output, steps, noise).to(b.dtype)
    terms = eps * b * _difference(model_output, old_model_output)
    return reduce(torch.where(std > 0, terms, 0.0), reduction)


def _weighted_distance(
    model_output: Tensor, anchor_output: Tensor, kl_gains: Tensor, steps: Tensor, reduction: str
) -> Tensor:
    """reduce( gain (v - v_ref)^2 ) with the gain of each sample's step; see lacfast.schedule.kl_gains."""
    squares = reduce(_difference(model_output, anchor_output) ** 2, reduction)
    return kl_gains.to(squares.dtype)[steps] * squares


def ppo_loss(
    model_output: Tensor,
    old_model_output: Tensor,
    advantages: Tensor,
    coefficients: Tensor,
    steps: Tensor,
    *,
    noise: Tensor | NoiseKey,
    clip_range: Clip | None = None,
    clip_nats: Clip | None = None,
    kl_threshold: float | None = None,
    dual_clip: float = math.inf,
    ratio: str = "innovation",
    weights: Tensor | None = None,
    step_weights: Tensor | None = None,
    mask: Tensor | None = None,
    anchor_output: Tensor | None = None,
    kl_weight: float = 0.0,
    kl_gains: Tensor | None = None,
    reduction: str = "mean",
) -> tuple[Tensor, PPOStats]:
    """PPO's clipped loss over transitions (arXiv 1707.06347, eq. 7), with a KL to the anchor.

        rho  = exp(log_ratio),   log_ratio of "innovation": see log_ratio; of "ratio_norm": reduce( eps b dv )
        loss = mean_i w_i step_weights[step_i] [ -gain(rho, A) + kl_weight kl_ref ]
        gain = min(rho A, clip(rho) A); variants and sources: lacfast.reference.surrogate.surrogate_gain
        kl_ref = reduce( kl_gains[step] (v - v_ref)^2 )

    Exactly one of `clip_range`, `clip_nats` and `kl_threshold` is given. The mean runs over the rows of
    `mask`. Where std = 0 there is no ratio: the row's loss, statistics and gradient are 0.

    Args:
        model_output: (B, ...) of the policy that is trained; gradients flow to it alone.
        old_model_output: (B, ...) of the policy that made the rollout.
        advantages: (B,)
        coefficients: (T, 3) columns a, b, std.
        steps: (B,) int64 row of `coefficients`.
        noise: (B, ...) eps of the rollout, or the key that it was drawn from.
        clip_range: bound of the ratio, both sides or (low, high), in the units of `reduction` ("mean": nats
            per element).
        clip_nats: the same on the joint ratio; under "mean", clip_range = clip_nats / N.
        kl_threshold: no clip; drops a pair whose kl_old reaches it and whose ratio moves with A.
        dual_clip: c > 1: gain >= c A where A < 0.
        ratio: "innovation" or "ratio_norm".
        weights: (B,) w of the pairs. None: 1.
        step_weights: (T,) weights of the steps. None: 1.
        mask: (B,) bool. False: the row's latents count nothing, whatever they hold. None: all True.
        anchor_output: (B, ...) of the anchor, the frozen policy of the KL. None: no KL.
        kl_weight: weight of that KL, which needs `anchor_output`.
        kl_gains: (T,) of lacfast.schedule.kl_gains. None: "exact", b^2 / (2 std^2).
        reduction: "mean" over elements or "sum".

    Returns:
        The loss () and detached statistics.

    Raises:
        ValueError: for an unknown ratio, or for none or several of the three bounds.
    """
    if ratio not in RATIOS:
        raise unknown("ratio", ratio, RATIOS)
    nats_per_unit = model_output[0].numel() if reduction == "mean" else 1
    limits = bounds(clip_range, clip_nats, kl_threshold, dual_clip, nats_per_unit=nats_per_unit)
    dtype = arithmetic_dtype(model_output)
    counts = coefficients[steps, 2] > 0
    if mask is not None:
        counts = counts & mask
    keep = counts.view(-1, *(1,) * (model_output.ndim - 1))
    model_output, old_model_output = (
        torch.where(keep, output, 0.0) for output in (model_output, old_model_output)
    )
    if isinstance(noise, Tensor):
        noise = torch.where(keep, noise, 0.0)
    if anchor_output is not None:
        anchor_output = torch.where(keep, anchor_output, 0.0)
    transition = (model_output, old_model_output, coefficients, steps)
    terms = log_ratio(*transition, noise=noise, anchor_output=anchor_output, reduction=reduction)
    log_rho, kl_ref = terms.log_ratio, terms.kl_ref
    if ratio == "ratio_norm":
        log_rho = _normalized_log_ratio(*transition, noise, reduction)
    if kl_gains is not None and anchor_output is not None:
        kl_ref = _weighted_distance(model_output, anchor_output, kl_gains, steps, reduction)
    gain, side = surrogate_gain(log_rho, terms.kl_old, advantages.to(dtype), limits)
    losses = -gain + kl_weight * kl_ref
    if weights is not None:
        losses = weights.to(dtype) * losses
    if step_weights is not None:
        losses = step_weights.to(dtype)[steps] * losses
    loss = masked_mean(torch.where(counts, losses, 0.0), mask)
    rows = torch.stack([log_rho, terms.kl_old, kl_ref, torch.where(counts, side, 0.0)], dim=1).detach()
    return loss, PPOStats(rows, sums_per_step(rows, steps, mask, len(coefficients)))
