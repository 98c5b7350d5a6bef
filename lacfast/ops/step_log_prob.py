"""step_log_prob: the log-probability of a transition that is given, for trainers that keep their own loop."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lacfast import reference
from lacfast.ops.backend import choose, launch, through_dispatcher
from lacfast.ops.checks import FLOATS, check_latents, check_operand, check_transition, reduction_scale


def step_log_prob(
    sample: Tensor,
    model_output: Tensor,
    prev_sample: Tensor,
    coefficients: Tensor,
    steps: Tensor,
    *,
    reduction: str = "mean",
) -> Tensor:
    """Log-probability of a given transition sample -> prev_sample, in one read; so are its gradients.

        log_prob = reduce( -(x' - mu)^2 / (2 std^2) - log std - log(2 pi) / 2 ),   mu = a x + b v
        with r = (x' - mu) / std^2:   d/dx = a r,   d/dv = b r,   d/dx' = -r

    Maths in float32, or float64 where the latents are float64; autocast changes nothing. Gradients flow to
    sample, model_output and prev_sample, each computed only where it is asked for; the backward pass keeps
    nothing but the inputs. Where std = 0 there is no density: log_prob and all gradients are 0.

    Args:
        sample: (B, ...) latents x.
        model_output: (B, ...) prediction v, after guidance; float64 where the sample is.
        prev_sample: (B, ...) latents x' that were reached; float64 where the sample is.
        coefficients: (T, 3) columns a, b, std; float32, or float64 for float64 latents.
        steps: (B,) int64 row of `coefficients` per sample, or a counter (1,) that all share. Only the CPU
            kernels notice one beyond the table.
        reduction: "mean" over elements (the field's convention) or "sum".

    Returns:
        (B,) in the dtype of the maths.

    Raises:
        ValueError: a shape, dtype, device or memory order that does not fit.
    """
    check_latents("sample", sample)
    like = ("sample", sample, sample.shape, FLOATS[3:] if sample.dtype == torch.float64 else FLOATS[:3])
    check_operand("model_output", model_output, *like)
    check_operand("prev_sample", prev_sample, *like)
    check_transition(coefficients, steps, "sample", sample, may_share_step=True)
    scale = reduction_scale(reduction, sample)
    chosen = choose("step_log_prob", sample.device.type, sample.dtype)
    if chosen == "reference":
        return reference.step_log_prob(
            sample, model_output, prev_sample, coefficients, steps, reduction=reduction
        )
    arguments = (sample, model_output, prev_sample, coefficients, steps, scale)
    log_prob: Tensor
    if through_dispatcher(sample):
        log_prob = _step_log_prob_op(*arguments)
    elif torch.is_grad_enabled() and (
        sample.requires_grad or model_output.requires_grad or prev_sample.requires_grad
    ):
        log_prob = _StepLogProb.apply(*arguments, chosen)  # type: ignore[no-untyped-call]
    else:
        log_prob = _forward(chosen, *arguments)
    return log_prob


def _forward(
    chosen: str,
    sample: Tensor,
    model_output: Tensor,
    prev_sample: Tensor,
    coefficients: Tensor,
    steps: Tensor,
    scale: float,
) -> Tensor:
    log_prob = coefficients.new_empty(sample.shape[0])
    arguments = (sample, model_output, prev_sample, coefficients, steps, scale)
    launch(chosen, "step_log_prob", sample, *arguments, log_prob)
    return log_prob


def _backward(
    chosen: str,
    grad_log_prob: Tensor,
    needed: tuple[bool, bool, bool],
    sample: Tensor,
    model_output: Tensor,
    prev_sample: Tensor,
    coefficients: Tensor,
    steps: Tensor,
    scale: float,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    inputs = (sample, model_output, prev_sample)
    grad_sample, grad_model_output, grad_prev_sample = (
        torch.empty_like(tensor) if is_needed else None
        for tensor, is_needed in zip(inputs, needed, strict=True)
    )
    gradients = (grad_sample, grad_model_output, grad_prev_sample)
    arguments = (*inputs, coefficients, steps, scale, grad_log_prob.contiguous())
    launch(chosen, "step_log_prob_backward", sample, *arguments, *gradients)
    return gradients


class _StepLogProb(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        *inputs, scale, chosen = arguments
        # Saving the steps too lets autograd notice a counter that was advanced in between.
        ctx.save_for_backward(*inputs)
        ctx.scale, ctx.chosen = scale, chosen
        return _forward(chosen, *arguments[:-1])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_log_prob: Tensor) -> Any:
        saved: tuple[Any, ...] = (*ctx.saved_tensors, ctx.scale)
        gradients = _backward(ctx.chosen, grad_log_prob, ctx.needs_input_grad[:3], *saved)
        return *gradients, None, None, None, None


@torch.library.custom_op("lacfast::step_log_prob", mutates_args=())
def _step_log_prob_op(
    sample: Tensor,
    model_output: Tensor,
    prev_sample: Tensor,
    coefficients: Tensor,
    steps: Tensor,
    scale: float,
) -> Tensor:
    chosen = choose("step_log_prob", sample.device.type, sample.dtype)
    return _forward(chosen, sample, model_output, prev_sample, coefficients, steps, scale)


@_step_log_prob_op.register_fake
def _(
    sample: Tensor,
    model_output: Tensor,
    prev_sample: Tensor,
    coefficients: Tensor,
    steps: Tensor,
    scale: float,
) -> Tensor:
    return coefficients.new_empty(sample.shape[0])


@torch.library.custom_op("lacfast::step_log_prob_backward", mutates_args=())
def _step_log_prob_backward_op(
    grad_log_prob: Tensor,
    needed: list[bool],
    sample: Tensor,
    model_output: Tensor,
    prev_sample: Tensor,
    coefficients: Tensor,
    steps: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    chosen = choose("step_log_prob_backward", sample.device.type, sample.dtype)
    inputs = (sample, model_output, prev_sample)
    wanted = (needed[0], needed[1], needed[2])
    gradients = _backward(chosen, grad_log_prob, wanted, *inputs, coefficients, steps, scale)
    # An operator cannot return None.
    grad_sample, grad_model_output, grad_prev_sample = (
        tensor.new_empty(0) if gradient is None else gradient
        for tensor, gradient in zip(inputs, gradients, strict=True)
    )
    return grad_sample, grad_model_output, grad_prev_sample


@_step_log_prob_backward_op.register_fake
def _(
    grad_log_prob: Tensor,
    needed: list[bool],
    sample: Tensor,
    model_output: Tensor,
    prev_sample: Tensor,
    coefficients: Tensor,
    steps: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    grad_sample, grad_model_output, grad_prev_sample = (
        torch.empty_like(tensor) if is_needed else tensor.new_empty(0)
        for tensor, is_needed in zip((sample, model_output, prev_sample), needed, strict=True)
    )
    return grad_sample, grad_model_output, grad_prev_sample


def _setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
    *tensors, scale = inputs
    ctx.save_for_backward(*tensors)
    ctx.scale = scale


def _op_backward(ctx: Any, grad_log_prob: Tensor) -> Any:
    needed = list(ctx.needs_input_grad[:3])
    gradients = _step_log_prob_backward_op(grad_log_prob, needed, *ctx.saved_tensors, ctx.scale)
    kept = (gradient if is_needed else None for gradient, is_needed in zip(gradients, needed, strict=True))
    return *kept, None, None, None


_step_log_prob_op.register_autograd(_op_backward, setup_context=_setup_context)
