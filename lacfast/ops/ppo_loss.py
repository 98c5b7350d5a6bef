"""log_ratio and ppo_loss: PPO's ratio, KLs and loss in innovation form, one read of the latents each way."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lacfast import reference
from lacfast.ops.backend import choose, launch, through_dispatcher
from lacfast.ops.checks import (
    arithmetic_dtype,
    check_latents,
    check_operand,
    check_transition,
    reduction_scale,
    split_noise,
)
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
        terms = _log_ratio_op(*arguments)
    elif torch.is_grad_enabled() and model_output.requires_grad:
        terms = _LogRatio.apply(chosen, *arguments)  # type: ignore[no-untyped-call]
    else:
        terms = _terms(chosen, *arguments)
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
        advantages: (B,) in the dtype of the maths (float32, or float64 for float64 outputs).
        clip_range: c, in the units of `reduction` ("mean": nats per element).
        weights: (B,) of the pairs, like advantages. None: 1.
        kl_weight: beta, needs `reference_output`.
        The others as `log_ratio`.

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
        rows = _ppo_rows_op(*arguments, *surrogate)
        loss = rows[:, LOSS].mean()
    elif torch.is_grad_enabled() and model_output.requires_grad:
        loss, rows = _PPOLoss.apply(chosen, *arguments, *surrogate)  # type: ignore[no-untyped-call]
    else:
        rows = _rows(chosen, *arguments, *surrogate)
        loss = rows[:, LOSS].mean()
    ratio, kl_old, kl_ref, _, _, clipped = rows.detach().unbind(dim=1)
    return loss, PPOStats(ratio, kl_old, kl_ref, clipped)


# Columns of the rows (B, 6) of the kernels: log_ratio, kl_old, kl_ref, loss, d loss / d log_ratio, side.
LOSS, GRAD_LOG_RATIO = 3, 4


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


def _terms(
    chosen: str,
    model_output: Tensor,
    old_model_output: Tensor,
    reference_output: Tensor | None,
    coefficients: Tensor,
    steps: Tensor,
    *key_and_scale: Any,
) -> Tensor:
    terms = coefficients.new_empty((steps.shape[0], 3))
    arguments = (model_output, old_model_output, reference_output, coefficients, steps, *key_and_scale)
    launch(chosen, "log_ratio_forward", model_output, *arguments, terms)
    return terms


def _rows(
    chosen: str,
    model_output: Tensor,
    old_model_output: Tensor,
    reference_output: Tensor | None,
    coefficients: Tensor,
    steps: Tensor,
    noise: Tensor | None,
    seed: Tensor | None,
    sample_ids: Tensor | None,
    scale: float,
    advantages: Tensor,
    weights: Tensor | None,
    clip_range: float,
    kl_weight: float,
) -> Tensor:
    rows = coefficients.new_empty((steps.shape[0], 6))
    launch(
        chosen,
        "ppo_loss_forward",
        model_output,
        model_output,
        old_model_output,
        reference_output,
        advantages,
        weights,
        coefficients,
        steps,
        noise,
        seed,
        sample_ids,
        scale,
        clip_range,
        kl_weight,
        rows,
    )
    return rows


def _grad_model_output(chosen: str, arguments: tuple[Any, ...], grad_terms: Tensor) -> Tensor:
    """From the gradients (B, 3) of log_ratio, kl_old, kl_ref; `arguments` are those of the forward."""
    grad_model_output = torch.empty_like(arguments[0])
    launch(chosen, "log_ratio_backward", arguments[0], *arguments, grad_terms.contiguous(), grad_model_output)
    return grad_model_output


def _grad_terms(rows: Tensor, weights: Tensor | None, kl_weight: float, grad_loss: Tensor) -> Tensor:
    """(B, 3) gradients of log_ratio, kl_old, kl_ref from that of each row's loss, (B,) or () for all."""
    grad_terms = rows.new_zeros((rows.shape[0], 3))
    grad_terms[:, 0] = rows[:, GRAD_LOG_RATIO] * grad_loss
    if kl_weight != 0:
        grad_terms[:, 2] = kl_weight * (grad_loss if weights is None else weights * grad_loss)
    return grad_terms


class _LogRatio(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, chosen: str, *arguments: Any) -> Tensor:
        ctx.save_for_backward(*arguments[:-1])
        ctx.scale, ctx.chosen = arguments[-1], chosen
        return _terms(chosen, *arguments)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        gradient = _grad_model_output(ctx.chosen, (*ctx.saved_tensors, ctx.scale), grads[0])
        return None, gradient, *([None] * 8)


class _PPOLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, chosen: str, *arguments: Any) -> tuple[Tensor, Tensor]:
        *ratio, scale, _, weights, _, kl_weight = arguments
        rows = _rows(chosen, *arguments)
        ctx.save_for_backward(rows, weights, *ratio)
        ctx.mark_non_differentiable(rows)
        ctx.set_materialize_grads(False)
        ctx.scale, ctx.kl_weight, ctx.chosen = scale, kl_weight, chosen
        return rows[:, LOSS].mean(), rows

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        if grads[0] is None:
            return (None,) * 14
        rows, weights, *ratio = ctx.saved_tensors
        grad_terms = _grad_terms(rows, weights, ctx.kl_weight, grads[0] / rows.shape[0])
        return None, _grad_model_output(ctx.chosen, (*ratio, ctx.scale), grad_terms), *([None] * 12)


@torch.library.custom_op("lacfast::log_ratio", mutates_args=())
def _log_ratio_op(
    model_output: Tensor,
    old_model_output: Tensor,
    reference_output: Tensor | None,
    coefficients: Tensor,
    steps: Tensor,
    noise: Tensor | None,
    seed: Tensor | None,
    sample_ids: Tensor | None,
    scale: float,
) -> Tensor:
    arguments = (model_output, old_model_output, reference_output, coefficients, steps)
    chosen = choose("log_ratio_forward", model_output.device.type, model_output.dtype)
    return _terms(chosen, *arguments, noise, seed, sample_ids, scale)


@_log_ratio_op.register_fake
def _(
    model_output: Tensor, old_model_output: Tensor, reference_output: Any, coefficients: Tensor, *_: Any
) -> Tensor:
    return coefficients.new_empty((model_output.shape[0], 3))


@torch.library.custom_op("lacfast::ppo_rows", mutates_args=())
def _ppo_rows_op(
    model_output: Tensor,
    old_model_output: Tensor,
    reference_output: Tensor | None,
    coefficients: Tensor,
    steps: Tensor,
    noise: Tensor | None,
    seed: Tensor | None,
    sample_ids: Tensor | None,
    scale: float,
    advantages: Tensor,
    weights: Tensor | None,
    clip_range: float,
    kl_weight: float,
) -> Tensor:
    arguments = (
        model_output,
        old_model_output,
        reference_output,
        coefficients,
        steps,
        noise,
        seed,
        sample_ids,
    )
    chosen = choose("ppo_loss_forward", model_output.device.type, model_output.dtype)
    return _rows(chosen, *arguments, scale, advantages, weights, clip_range, kl_weight)


@_ppo_rows_op.register_fake
def _(
    model_output: Tensor, old_model_output: Tensor, reference_output: Any, coefficients: Tensor, *_: Any
) -> Tensor:
    return coefficients.new_empty((model_output.shape[0], 6))


@torch.library.custom_op("lacfast::log_ratio_backward", mutates_args=())
def _log_ratio_backward_op(
    model_output: Tensor,
    old_model_output: Tensor,
    reference_output: Tensor | None,
    coefficients: Tensor,
    steps: Tensor,
    noise: Tensor | None,
    seed: Tensor | None,
    sample_ids: Tensor | None,
    scale: float,
    grad_terms: Tensor,
) -> Tensor:
    arguments = (
        model_output,
        old_model_output,
        reference_output,
        coefficients,
        steps,
        noise,
        seed,
        sample_ids,
    )
    chosen = choose("log_ratio_backward", model_output.device.type, model_output.dtype)
    return _grad_model_output(chosen, (*arguments, scale), grad_terms)


@_log_ratio_backward_op.register_fake
def _(model_output: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(model_output)


def _save_ratio(ctx: Any, inputs: Any, output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:-1])
    ctx.scale = inputs[-1]


def _log_ratio_op_backward(ctx: Any, grad_terms: Tensor) -> Any:
    return _log_ratio_backward_op(*ctx.saved_tensors, ctx.scale, grad_terms), *([None] * 8)


def _save_rows(ctx: Any, inputs: Any, output: Tensor) -> None:
    *ratio, scale, _, weights, _, kl_weight = inputs
    ctx.save_for_backward(output, weights, *ratio)
    ctx.scale, ctx.kl_weight = scale, kl_weight


def _ppo_rows_op_backward(ctx: Any, grad_rows: Tensor) -> Any:
    rows, weights, *ratio = ctx.saved_tensors
    grad_terms = _grad_terms(rows, weights, ctx.kl_weight, grad_rows[:, LOSS])
    return _log_ratio_backward_op(*ratio, ctx.scale, grad_terms), *([None] * 12)


_log_ratio_op.register_autograd(_log_ratio_op_backward, setup_context=_save_ratio)
_ppo_rows_op.register_autograd(_ppo_rows_op_backward, setup_context=_save_rows)
