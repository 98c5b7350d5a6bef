"""The calls behind log_ratio: kernels, autograd, and registration with torch's dispatcher."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lacfast.ops.backend import choose, launch


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


def _grad_model_output(chosen: str, arguments: tuple[Any, ...], grad_terms: Tensor) -> Tensor:
    """From the gradients (B, 3) of log_ratio, kl_old, kl_ref; `arguments` are those of the forward."""
    grad_model_output = torch.empty_like(arguments[0])
    launch(chosen, "log_ratio_backward", arguments[0], *arguments, grad_terms.contiguous(), grad_model_output)
    return grad_model_output


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


log_ratio_op.register_autograd(_log_ratio_op_backward, setup_context=_save_ratio)
