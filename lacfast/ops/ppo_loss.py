"""log_ratio and ppo_loss: PPO's ratio, KLs and loss in innovation form, one read of the latents each way."""

from __future__ import annotations

import torch
from torch import Tensor

from lacfast import reference
from lacfast.ops.backend import choose, through_dispatcher
from lacfast.ops.checks import (
    arithmetic_dtype,
    check_latents,
    check_operand,
    check_transition,
    reduction_scale,
    split_noise,
)
from lacfast.ops.ppo_calls import LOSS, LogRatio, PPOLoss, log_ratio_op, ppo_rows_op, rows_of, terms_of
from lacfast.records import NoiseKey, PPOStats, TransitionTerms


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
    Maths in float32, or float64 for float64; the gradient flows to model_output alone.

    Args:
        model_output: (B, ...) of the policy that is trained.
        old_model_output: (B, ...) of the policy that made the rollout, like model_output.
        coefficients: (T, 3) columns a, b, std; float32, or float64 for float64 outputs.
        steps: (B,) int64 row of `coefficients`. Only the CPU kernels notice a row beyond the table.
        noise: (B, ...) the rollout's eps in float32 or the outputs' dtype, or the key that regenerates it.
        reference_output: (B, ...) of the reference model, like model_output.
        reduction: "mean" over elements or "sum".

    Returns:
        log_ratio, kl_old and kl_ref (0 without a reference), each (B,) in the dtype of the maths.

    Raises:
        ValueError: a shape, dtype, device or memory order that does not fit.
    """
    key = _check(model_output, old_model_output, coefficients, steps, noise, reference_output)
    scale = reduction_scale(reduction, model_output)
    chosen = choose("log_ratio_forward", model_output.device.type, model_output.dtype)
    if chosen == "reference":
        return reference.log_ratio(
            model_output,
            old_model_output,
            coefficients,
            steps,
            noise=noise,
            reference_output=reference_output,
            reduction=reduction,
        )
    arguments = (model_output, old_model_output, reference_output, coefficients, steps, *key, scale)
    if through_dispatcher(model_output):
        terms = log_ratio_op(*arguments)
    elif torch.is_grad_enabled() and model_output.requires_grad:
        terms = LogRatio.apply(chosen, *arguments)  # type: ignore[no-untyped-call]
    else:
        terms = terms_of(chosen, *arguments)
    return TransitionTerms(*terms.unbind(dim=1))


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
        advantages: (B,) in the dtype of the maths (float32, or float64 for float64 outputs).
        coefficients: (T, 3) columns a, b, std.
        steps: (B,) int64 row of `coefficients`.
        noise: (B, ...) the eps of the rollout, or the key that regenerates it.
        clip_range: c, in the units of `reduction` ("mean": nats per element).
        weights: (B,) of the pairs, like advantages. None: 1.
        reference_output: (B, ...) of the reference model.
        kl_weight: beta, needs `reference_output`.
        reduction: "mean" over elements or "sum".

    Returns:
        The loss () and detached statistics (B,). The gradient flows to model_output alone.

    Raises:
        ValueError: a shape, dtype, device or memory order that does not fit; kl_weight without a reference.
    """
    key = _check(model_output, old_model_output, coefficients, steps, noise, reference_output)
    per_sample = (model_output.shape[:1], (arithmetic_dtype(model_output),))
    check_operand("advantages", advantages, "model_output", model_output, *per_sample)
    if weights is not None:
        check_operand("weights", weights, "model_output", model_output, *per_sample)
    if not clip_range > 0:
        raise ValueError(f"clip_range is {clip_range}; it must be above 0 in mean units near 1e-5 to 1e-4")
    if kl_weight != 0 and reference_output is None:
        raise ValueError(
            f"kl_weight is {kl_weight} but there is no reference_output; pass one, or kl_weight=0"
        )
    scale = reduction_scale(reduction, model_output)
    chosen = choose("ppo_loss_forward", model_output.device.type, model_output.dtype)
    if chosen == "reference":
        return reference.ppo_loss(
            model_output,
            old_model_output,
            advantages,
            coefficients,
            steps,
            noise=noise,
            clip_range=clip_range,
            weights=weights,
            reference_output=reference_output,
            kl_weight=kl_weight,
            reduction=reduction,
        )
    arguments = (model_output, old_model_output, reference_output, coefficients, steps, *key, scale)
    surrogate = (advantages, weights, float(clip_range), float(kl_weight))
    if through_dispatcher(model_output):
        rows = ppo_rows_op(*arguments, *surrogate)
        loss = rows[:, LOSS].mean()
    elif torch.is_grad_enabled() and model_output.requires_grad:
        loss, rows = PPOLoss.apply(chosen, *arguments, *surrogate)  # type: ignore[no-untyped-call]
    else:
        rows = rows_of(chosen, *arguments, *surrogate)
        loss = rows[:, LOSS].mean()
    ratio, kl_old, kl_ref, _, _, clipped = rows.detach().unbind(dim=1)
    return loss, PPOStats(ratio, kl_old, kl_ref, clipped)


def _check(
    model_output: Tensor,
    old_model_output: Tensor,
    coefficients: Tensor,
    steps: Tensor,
    noise: Tensor | NoiseKey,
    reference_output: Tensor | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    check_latents("model_output", model_output)
    like = ("model_output", model_output, model_output.shape, (model_output.dtype,))
    check_operand("old_model_output", old_model_output, *like)
    if reference_output is not None:
        check_operand("reference_output", reference_output, *like)
    check_transition(coefficients, steps, "model_output", model_output)
    return split_noise(noise, "model_output", model_output)
