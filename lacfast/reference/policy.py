"""3. Ratio and loss: PPO in innovation form."""

from __future__ import annotations

import torch
from torch import Tensor

from lacfast.records import NoiseKey, PPOStats, TransitionTerms
from lacfast.reference.noise import noise_for
from lacfast.reference.transition import compute_dtype, reduce, rows_of


def log_ratio(
    model_output: Tensor,
    old_model_output: Tensor,
    coefficients: Tensor,
    steps: Tensor,
    *,
    noise: Tensor | NoiseKey,
    reference_output: Tensor | None = None,
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
        model_output: (B, ...) of the policy that is trained; gradients flow to it alone.
        old_model_output: (B, ...) of the policy that made the rollout.
        coefficients: (T, 3) columns a, b, std.
        steps: (B,) int64 row of `coefficients`.
        noise: (B, ...) the eps of the rollout, or the key that regenerates it.
        reference_output: (B, ...) of the reference model.
        reduction: "mean" over elements or "sum".
    """
    dtype = compute_dtype(model_output)
    _, b, std = rows_of(coefficients, steps, model_output)
    stochastic = std > 0
    gain = torch.where(
        stochastic, b / torch.where(stochastic, std, torch.ones_like(std)), torch.zeros_like(std)
    )
    eps = torch.where(stochastic, noise_for(model_output, steps, noise).to(dtype), 0.0)
    shift = gain * (model_output.to(dtype) - old_model_output.detach().to(dtype))
    kl_old = reduce(shift**2 / 2, reduction)
    ratio_terms = reduce(eps * shift - shift**2 / 2, reduction)
    if reference_output is None:
        return TransitionTerms(ratio_terms, kl_old, torch.zeros_like(kl_old))
    shift_ref = gain * (model_output.to(dtype) - reference_output.detach().to(dtype))
    return TransitionTerms(ratio_terms, kl_old, reduce(shift_ref**2 / 2, reduction))


def ppo_loss(
    model_output: Tensor,
    old_model_output: Tensor,
    advantages: Tensor,
    coefficients: Tensor,
    steps: Tensor,
    *,
    noise: Tensor | NoiseKey,
    clip_range: float,
    weights: Tensor | None = None,
    reference_output: Tensor | None = None,
    kl_weight: float = 0.0,
    reduction: str = "mean",
) -> tuple[Tensor, PPOStats]:
    """Clipped surrogate of PPO (arXiv 1707.06347, eq. 7) over transitions, with a KL to the reference.

        rho  = exp(log_ratio)
        loss = mean_i w_i [ -min( rho A, clip(rho, 1 - c, 1 + c) A ) + kl_weight kl_ref ]

    Args:
        model_output: (B, ...) of the policy that is trained.
        old_model_output: (B, ...) of the policy that made the rollout.
        advantages: (B,)
        coefficients: (T, 3) columns a, b, std.
        steps: (B,) int64 row of `coefficients`.
        noise: (B, ...) the eps of the rollout, or the key that regenerates it.
        clip_range: c, in the units of `reduction` ("mean": nats per element).
        weights: (B,) of the pairs. None: 1.
        reference_output: (B, ...) of the reference model.
        kl_weight: beta, needs `reference_output`.
        reduction: "mean" over elements or "sum".

    Returns:
        The loss () and detached statistics (B,).
    """
    terms = log_ratio(
        model_output,
        old_model_output,
        coefficients,
        steps,
        noise=noise,
        reference_output=reference_output,
        reduction=reduction,
    )
    advantages = advantages.to(terms.log_ratio.dtype)
    ratio = terms.log_ratio.exp()
    unclipped = ratio * advantages
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range) * advantages
    losses = -torch.minimum(unclipped, clipped) + kl_weight * terms.kl_ref
    loss = (losses if weights is None else weights.to(losses.dtype) * losses).mean()
    high = (ratio > 1 + clip_range) & (advantages > 0)
    low = (ratio < 1 - clip_range) & (advantages < 0)
    side = high.to(ratio.dtype) - low.to(ratio.dtype)
    return loss, PPOStats(terms.log_ratio.detach(), terms.kl_old.detach(), terms.kl_ref.detach(), side)
