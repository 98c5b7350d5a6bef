"""gaussian_step: guidance, transition, noise and log-prob of one denoising step in one read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lacfast import reference
from lacfast.ops.backend import choose, launch, through_dispatcher
from lacfast.ops.checks import arithmetic_dtype, reduction_scale
from lacfast.ops.gaussian_step_buffers import check_buffers, check_step, gaussian_step_out_op
from lacfast.records import NoiseKey, StepOutput


def gaussian_step(
    sample: Tensor,
    model_output: Tensor,
    coefficients: Tensor,
    steps: Tensor,
    *,
    noise: Tensor | NoiseKey,
    uncond_output: Tensor | None = None,
    guidance_scale: Tensor | None = None,
    reduction: str = "mean",
    out: StepOutput | None = None,
) -> StepOutput:
    """One denoising step and the log-probability of where it landed.

        v  = v_uncond + guidance_scale (v_cond - v_uncond)        with guidance
        x' = a x + b v + std eps
        log_prob = reduce( -(x' - mu)^2 / (2 std^2) - log std - log(2 pi) / 2 ),   mu = a x + b v

    Maths in float32, or float64 where the latents are float64. The log-prob is that of the stored x', after
    rounding, and treats x' as a constant; x' itself carries gradients a and b. Gradients flow to sample,
    model_output and uncond_output. Where std = 0 the step is deterministic: noise is not read, log_prob is 0.

    Args:
        sample: (B, ...) latents.
        model_output: (B, ...) prediction, the conditional half when guided; float64 where the sample is.
        coefficients: (T, 3) columns a, b, std; float32, or float64 for float64 latents.
        steps: (B,) int64 row of `coefficients` per sample, or a counter (1,) that all share. Only the CPU
            kernels notice one beyond the table.
        noise: (B, ...) eps in float32 or the sample's dtype, or the key that regenerates it.
        uncond_output: (B, ...) unconditional prediction, like model_output.
        guidance_scale: (1,) float32, needed with `uncond_output`.
        reduction: "mean" over elements (the field's convention) or "sum".
        out: buffers to fill in place of new tensors, without gradients. Each may be one of the inputs that it
            is made from; model_output is written with guidance only.

    Returns:
        prev_sample (B, ...) in the sample's dtype, log_prob (B,) in the dtype of the maths, and the output
        that was used: the argument itself, or after guidance a tensor of its dtype.

    Raises:
        ValueError: a shape, dtype, device or memory order that does not fit; `out` where gradients are asked.
    """
    key = check_step(sample, model_output, coefficients, steps, noise, uncond_output, guidance_scale)
    if out is not None:
        check_buffers(out, sample, model_output, uncond_output)
    scale = reduction_scale(reduction, sample)
    chosen = choose("gaussian_step", sample.device.type, sample.dtype)
    if chosen == "reference":
        result = reference.gaussian_step(
            sample,
            model_output,
            coefficients,
            steps,
            noise=noise,
            uncond_output=uncond_output,
            guidance_scale=guidance_scale,
            reduction=reduction,
        )
        return result if out is None else _copied(result, out, is_guided=uncond_output is not None)
    arguments = (sample, model_output, uncond_output, guidance_scale, coefficients, steps, *key, scale)
    if out is not None:
        buffers = (out.prev_sample, out.log_prob, None if uncond_output is None else out.model_output)
        if through_dispatcher(sample):
            gaussian_step_out_op(*arguments, *buffers)
        else:
            launch(chosen, "gaussian_step", sample, *arguments, *buffers)
        return out if uncond_output is not None else replace(out, model_output=model_output)
    if through_dispatcher(sample):
        prev_sample, log_prob, guided = _gaussian_step_op(*arguments)
    elif torch.is_grad_enabled() and _requires_grad(sample, model_output, uncond_output):
        prev_sample, log_prob, guided = _GaussianStep.apply(  # type: ignore[no-untyped-call]
            *arguments, chosen
        )
    else:
        prev_sample, log_prob, guided = _forward(chosen, *arguments)
    return StepOutput(prev_sample, log_prob, model_output if uncond_output is None else guided)


def _copied(result: StepOutput, out: StepOutput, *, is_guided: bool) -> StepOutput:
    out.prev_sample.copy_(result.prev_sample)
    out.log_prob.copy_(result.log_prob)
    if not is_guided:
        return replace(out, model_output=result.model_output)
    out.model_output.copy_(result.model_output)
    return out


def _requires_grad(*tensors: Tensor | None) -> bool:
    return any(tensor is not None and tensor.requires_grad for tensor in tensors)


def _forward(
    chosen: str,
    sample: Tensor,
    model_output: Tensor,
    uncond_output: Tensor | None,
    guidance_scale: Tensor | None,
    coefficients: Tensor,
    steps: Tensor,
    noise: Tensor | None,
    seed: Tensor | None,
    sample_ids: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor | None]:
    prev_sample = torch.empty_like(sample)
    log_prob = coefficients.new_empty(sample.shape[0])
    guided = None if uncond_output is None else torch.empty_like(model_output)
    launch(
        chosen,
        "gaussian_step",
        sample,
        sample,
        model_output,
        uncond_output,
        guidance_scale,
        coefficients,
        steps,
        noise,
        seed,
        sample_ids,
        scale,
        prev_sample,
        log_prob,
        guided,
    )
    return prev_sample, log_prob, guided


def _gradients(
    saved: Sequence[Any],
    scale: float,
    grad_prev_sample: Tensor | None,
    grad_log_prob: Tensor | None,
    grad_guided: Tensor | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Of sample, model_output, uncond_output: dx' = a dx + b dv, dlog_prob = scale (x' - mu) / std^2 dmu."""
    sample, used_output, prev_sample, guidance_scale, coefficients, steps = saved
    dtype = arithmetic_dtype(sample)
    broadcast = (-1,) + (1,) * (sample.ndim - 1)
    a, b, std = (column.view(broadcast) for column in coefficients[steps].unbind(dim=1))
    grad_mean = None if grad_prev_sample is None else grad_prev_sample.to(dtype)
    if grad_log_prob is not None:
        mean = a * sample.to(dtype) + b * used_output.to(dtype)
        precision = torch.where(std > 0, std, torch.ones_like(std)) ** -2 * (std > 0)
        pull = scale * grad_log_prob.view(broadcast) * precision * (prev_sample.to(dtype) - mean)
        grad_mean = pull if grad_mean is None else grad_mean + pull
    grad_output = None if grad_mean is None else b * grad_mean
    if grad_guided is not None and guidance_scale is not None:
        grad_output = grad_guided.to(dtype) if grad_output is None else grad_output + grad_guided
    if grad_output is None:
        return None, None, None
    grad_sample = None if grad_mean is None else (a * grad_mean).to(sample.dtype)
    if guidance_scale is None:
        return grad_sample, grad_output.to(used_output.dtype), None
    grad_cond = (guidance_scale * grad_output).to(used_output.dtype)
    return grad_sample, grad_cond, ((1 - guidance_scale) * grad_output).to(used_output.dtype)


class _GaussianStep(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor, Tensor | None]:
        sample, model_output, _, guidance_scale, coefficients, steps, _, _, _, scale, chosen = arguments
        prev_sample, log_prob, guided = _forward(chosen, *arguments[:-1])
        used_output = model_output if guided is None else guided
        ctx.save_for_backward(sample, used_output, prev_sample, guidance_scale, coefficients, steps)
        ctx.scale = scale
        ctx.set_materialize_grads(False)
        return prev_sample, log_prob, guided

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        grad_prev_sample, grad_log_prob, grad_guided = grads
        gradients = _gradients(ctx.saved_tensors, ctx.scale, grad_prev_sample, grad_log_prob, grad_guided)
        return (*gradients, *([None] * 8))


@torch.library.custom_op("lacfast::gaussian_step", mutates_args=())
def _gaussian_step_op(
    sample: Tensor,
    model_output: Tensor,
    uncond_output: Tensor | None,
    guidance_scale: Tensor | None,
    coefficients: Tensor,
    steps: Tensor,
    noise: Tensor | None,
    seed: Tensor | None,
    sample_ids: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    prev_sample, log_prob, guided = _forward(
        choose("gaussian_step", sample.device.type, sample.dtype),
        sample,
        model_output,
        uncond_output,
        guidance_scale,
        coefficients,
        steps,
        noise,
        seed,
        sample_ids,
        scale,
    )
    return prev_sample, log_prob, model_output.new_empty(0) if guided is None else guided


@_gaussian_step_op.register_fake
def _(
    sample: Tensor,
    model_output: Tensor,
    uncond_output: Tensor | None,
    guidance_scale: Tensor | None,
    coefficients: Tensor,
    steps: Tensor,
    noise: Tensor | None,
    seed: Tensor | None,
    sample_ids: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    guided = model_output.new_empty(0) if uncond_output is None else torch.empty_like(model_output)
    return torch.empty_like(sample), coefficients.new_empty(sample.shape[0]), guided


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    sample, model_output, uncond_output, guidance_scale, coefficients, steps, _, _, _, scale = inputs
    prev_sample, _, guided = output
    used_output = model_output if uncond_output is None else guided
    ctx.save_for_backward(sample, used_output, prev_sample, guidance_scale, coefficients, steps)
    ctx.scale = scale


def _op_backward(
    ctx: Any, grad_prev_sample: Tensor | None, grad_log_prob: Tensor | None, grad_guided: Tensor | None
) -> Any:
    gradients = _gradients(ctx.saved_tensors, ctx.scale, grad_prev_sample, grad_log_prob, grad_guided)
    return (*gradients, *([None] * 7))


_gaussian_step_op.register_autograd(_op_backward, setup_context=_setup_context)
