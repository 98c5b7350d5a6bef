"""The calls behind log_ratio and ppo_loss: kernels, autograd, and registration with torch's dispatcher."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lacfast.ops.backend import choose, launch

# Columns of the rows (B, 6) of the kernels: log_ratio, kl_old, kl_ref, loss, d loss / d log_ratio, side.
LOSS, GRAD_LOG_RATIO = 3, 4


def terms_of(
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


def rows_of(
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


class LogRatio(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, chosen: str, *arguments: Any) -> Tensor:
        ctx.save_for_backward(*arguments[:-1])
        ctx.scale, ctx.chosen = arguments[-1], chosen
        return terms_of(chosen, *arguments)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        gradient = _grad_model_output(ctx.chosen, (*ctx.saved_tensors, ctx.scale), grads[0])
        return None, gradient, *([None] * 8)


class PPOLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, chosen: str, *arguments: Any) -> tuple[Tensor, Tensor]:
        *ratio, scale, _, weights, _, kl_weight = arguments
        rows = rows_of(chosen, *arguments)
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
def log_ratio_op(
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
    return terms_of(chosen, *arguments, noise, seed, sample_ids, scale)


@log_ratio_op.register_fake
def _(
    model_output: Tensor, old_model_output: Tensor, reference_output: Any, coefficients: Tensor, *_: Any
) -> Tensor:
    return coefficients.new_empty((model_output.shape[0], 3))


@torch.library.custom_op("lacfast::ppo_rows", mutates_args=())
def ppo_rows_op(
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
    return rows_of(chosen, *arguments, scale, advantages, weights, clip_range, kl_weight)


@ppo_rows_op.register_fake
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


log_ratio_op.register_autograd(_log_ratio_op_backward, setup_context=_save_ratio)
ppo_rows_op.register_autograd(_ppo_rows_op_backward, setup_context=_save_rows)
