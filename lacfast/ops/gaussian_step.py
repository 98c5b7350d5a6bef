"""gaussian_step: guidance, transition, noise and log-prob of one denoising step in one read."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lacfast import reference
from lacfast.ops.checks import arithmetic_dtype, check_step, reduction_scale, split_noise
from lacfast.ops.op import Gradients, Op, Sized
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

    Returns:
        prev_sample (B, ...) in the sample's dtype, log_prob (B,) in the dtype of the maths, and the output
        that was used: the argument itself, or after guidance a tensor of its dtype.

    Raises:
        ValueError: a shape, dtype, device or memory order that does not fit.
    """
    key = split_noise(noise)
    check_step(sample, model_output, coefficients, steps, uncond_output, guidance_scale, *key)
    scale = reduction_scale(reduction, sample)
    chosen = GAUSSIAN_STEP.chosen(sample)
    if chosen == "reference":
        return reference.gaussian_step(
            sample,
            model_output,
            coefficients,
            steps,
            noise=noise,
            uncond_output=uncond_output,
            guidance_scale=guidance_scale,
            reduction=reduction,
        )
    inputs = GaussianStep(
        sample, model_output, uncond_output, guidance_scale, coefficients, steps, *key, scale
    )
    prev_sample, log_prob, guided_output = GAUSSIAN_STEP(chosen, inputs)
    return StepOutput(prev_sample, log_prob, model_output if guided_output is None else guided_output)


class GaussianStep(NamedTuple):
    sample: Sized
    model_output: Tensor
    uncond_output: Tensor | None
    guidance_scale: Tensor | None
    coefficients: Sized
    steps: Sized
    noise: Tensor | None
    seed: Tensor | None
    sample_ids: Tensor | None
    scale: float


class GaussianStepOutputs(NamedTuple):
    prev_sample: Tensor
    log_prob: Tensor
    guided_output: Tensor | None
    """The output after guidance, None without."""


def _allocate(inputs: GaussianStep) -> GaussianStepOutputs:
    sample = inputs.sample
    guided_output = None if inputs.uncond_output is None else torch.empty_like(inputs.model_output)
    log_prob = inputs.coefficients.new_empty(sample.shape[0])
    return GaussianStepOutputs(torch.empty_like(sample), log_prob, guided_output)


def _gradients(inputs: GaussianStep, outputs: GaussianStepOutputs, grads: Gradients) -> Gradients:
    """Gradients of sample, both outputs: dx' = a dx + b dv, dlog_prob = scale (x' - mu) / std^2 dmu."""
    sample, guidance_scale = inputs.sample, inputs.guidance_scale
    used_output = inputs.model_output if outputs.guided_output is None else outputs.guided_output
    dtype = arithmetic_dtype(sample)
    broadcast = (-1,) + (1,) * (sample.ndim - 1)
    a, b, std = (column.view(broadcast) for column in inputs.coefficients[inputs.steps].unbind(dim=1))
    grad_prev_sample, grad_log_prob, grad_guided = grads
    grad_mean = None if grad_prev_sample is None else grad_prev_sample.to(dtype)
    if grad_log_prob is not None:
        mean = a * sample.to(dtype) + b * used_output.to(dtype)
        precision = torch.where(std > 0, std, torch.ones_like(std)) ** -2 * (std > 0)
        distance = outputs.prev_sample.to(dtype) - mean
        pull = inputs.scale * grad_log_prob.view(broadcast) * precision * distance
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


GAUSSIAN_STEP = Op(
    "gaussian_step",
    GaussianStep,
    GaussianStepOutputs,
    _allocate,
    triton=("gaussian_step",),
    gradients=("sample", "model_output", "uncond_output"),
    keeps=(
        *("sample", "model_output", "guidance_scale", "coefficients", "steps"),
        *("prev_sample", "guided_output"),
    ),
    formula=_gradients,
)
