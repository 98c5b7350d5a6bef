"""2. Transition: one affine step of a sampler, and its log-probability."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lacfast.records import NoiseKey, StepOutput, TrajectorySlab
from lacfast.reference.noise import noise_for


def arithmetic_dtype(tensor: Tensor) -> torch.dtype:
    """float64 for float64, else float32: the type in which the maths is done."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def rows_of(coefficients: Tensor, steps: Tensor, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """a, b and std of every sample's step, each shaped to multiply `like` (B, ...)."""
    rows = coefficients.to(arithmetic_dtype(like))[steps]
    shape = (-1,) + (1,) * (like.ndim - 1)
    a, b, std = rows.unbind(dim=1)
    return a.view(shape), b.view(shape), std.view(shape)


def reduce(terms: Tensor, reduction: str) -> Tensor:
    """Mean or sum (B,) of terms (B, ...) over the elements of each sample.

    Raises:
        ValueError: for a reduction other than "mean" and "sum".
    """
    if reduction not in ("mean", "sum"):
        raise ValueError(f"unknown reduction {reduction!r}; known: 'mean' (per element), 'sum' (joint)")
    flat = terms.flatten(1)
    return flat.mean(dim=1) if reduction == "mean" else flat.sum(dim=1)


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

    The log-prob is that of the stored x', after rounding to the sample's dtype, and treats x' as a
    constant; x' itself carries gradients a and b. Where std = 0 the step is deterministic, log_prob 0.

    Args:
        sample: (B, ...) latents.
        model_output: (B, ...) prediction of the model, conditional half when guided.
        coefficients: (T, 3) columns a, b, std.
        steps: (B,) int64 row of `coefficients` for each sample, or (1,) when all share it.
        noise: (B, ...) eps, or the key that it is drawn from.
        uncond_output: (B, ...) unconditional prediction. None: no guidance.
        guidance_scale: (1,) float, needed with `uncond_output`.
        reduction: "mean" over elements (the field's convention) or "sum".
    """
    dtype = arithmetic_dtype(sample)
    a, b, std = rows_of(coefficients, steps, sample)
    if uncond_output is not None and guidance_scale is not None:
        model_output = _guided(model_output, uncond_output, guidance_scale, dtype)
    mean = a * sample.to(dtype) + b * model_output.to(dtype)
    eps = torch.where(std > 0, noise_for(sample, steps, noise).to(dtype), 0.0)
    prev_sample = (mean + std * eps).to(sample.dtype)
    return StepOutput(
        prev_sample, _log_prob(prev_sample.detach().to(dtype), mean, std, reduction), model_output
    )


def _guided(
    model_output: Tensor, uncond_output: Tensor, guidance_scale: Tensor, dtype: torch.dtype
) -> Tensor:
    uncond = uncond_output.to(dtype)
    return (uncond + guidance_scale.to(dtype) * (model_output.to(dtype) - uncond)).to(model_output.dtype)


def gaussian_step_(
    sample: Tensor,
    model_output: Tensor,
    coefficients: Tensor,
    steps: Tensor,
    *,
    noise: Tensor | NoiseKey,
    slab: TrajectorySlab,
    uncond_output: Tensor | None = None,
    guidance_scale: Tensor | None = None,
    reduction: str = "mean",
) -> None:
    """`gaussian_step` in place: moves `sample`, and keeps the transition of step k in slice k of `slab`.

    Model output and latent are rounded as the slab stores them before they are used: the log-prob is that
    of the stored latent under the stored output, and `sample` becomes the stored latent.

    Args:
        sample: (B, ...) latents, overwritten.
        slab: of T steps, see TrajectorySlab; the other arguments are those of `gaussian_step`.
    """
    if uncond_output is not None and guidance_scale is not None:
        model_output = _guided(model_output, uncond_output, guidance_scale, arithmetic_dtype(sample))
    model_output = model_output.to(slab.model_outputs.dtype)
    prev_sample = gaussian_step(sample, model_output, coefficients, steps, noise=noise).prev_sample
    prev_sample = prev_sample.to(slab.latents.dtype)
    log_prob = step_log_prob(sample, model_output, prev_sample, coefficients, steps, reduction=reduction)
    steps, rows = steps.expand(sample.shape[0]), torch.arange(sample.shape[0], device=sample.device)
    slab.model_outputs[steps, rows] = model_output
    slab.log_probs[steps, rows] = log_prob
    slab.latents[steps + 1, rows] = prev_sample
    sample.copy_(prev_sample)


def _log_prob(prev_sample: Tensor, mean: Tensor, std: Tensor, reduction: str) -> Tensor:
    stochastic = std > 0
    safe_std = torch.where(stochastic, std, torch.ones_like(std))
    terms = -((prev_sample - mean) ** 2) / (2 * safe_std**2) - safe_std.log() - math.log(2 * math.pi) / 2
    return reduce(torch.where(stochastic, terms, torch.zeros_like(terms)), reduction)


def step_log_prob(
    sample: Tensor,
    model_output: Tensor,
    prev_sample: Tensor,
    coefficients: Tensor,
    steps: Tensor,
    *,
    reduction: str = "mean",
) -> Tensor:
    """Log-probability (B,) of a given transition sample -> prev_sample; arguments as `gaussian_step`.

    Gradients flow to all three: with r = (x' - mu) / std^2 they are a r, b r and -r, 0 where std = 0.
    """
    dtype = arithmetic_dtype(sample)
    a, b, std = rows_of(coefficients, steps, sample)
    mean = a * sample.to(dtype) + b * model_output.to(dtype)
    return _log_prob(prev_sample.to(dtype), mean, std, reduction)
