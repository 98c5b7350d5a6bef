"""gaussian_step into memory that exists: plain buffers, or a sample in place with its slices of a slab.

Nothing of latent size is allocated, so a captured graph replays these on the same addresses. They have no
gradients. The functional form and the checks that all forms share are in gaussian_step.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lacfast import reference
from lacfast.ops.backend import choose, launch, through_dispatcher
from lacfast.ops.checks import (
    FLOATS,
    arithmetic_dtype,
    check_latents,
    check_operand,
    check_transition,
    reduction_scale,
    split_noise,
)
from lacfast.records import NoiseKey, StepOutput, TrajectorySlab


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
    """`gaussian_step` that moves `sample` in place and keeps the transition in slices of `slab`.

        v = v_uncond + guidance_scale (v_cond - v_uncond), as the slab stores it    -> slab.model_outputs[k]
        sample <- a sample + b v + std eps, as the slab stores it                   -> slab.latents[k + 1]
        log_prob of that transition                                                 -> slab.log_probs[k]

    k is each sample's own step, or the counter that all share; the slices are found on the device. This is
    one dispatched operation without allocations of latent size, so it can be captured in a graph: advance
    the counter between replays. Dtypes and std = 0 as in `gaussian_step`; no gradients.

    Args:
        sample: (B, ...) latents, overwritten.
        model_output: (B, ...) prediction, the conditional half when guided.
        coefficients: (T, 3) columns a, b, std.
        steps: (B,) int64 row of `coefficients` per sample, or a counter (1,).
        noise: (B, ...) eps, or the key that regenerates it.
        slab: T slices. Latents in the sample's dtype, or narrower than a float32 sample; model outputs in any
            dtype that the op computes on; log_probs in the dtype of the maths.
        uncond_output: (B, ...) unconditional prediction.
        guidance_scale: (1,) float32, needed with `uncond_output`.
        reduction: "mean" over elements or "sum".

    Raises:
        ValueError: a shape, dtype, device or memory order that does not fit; an input that needs gradients.
    """
    key = check_step(sample, model_output, coefficients, steps, noise, uncond_output, guidance_scale)
    _check_slab(slab, sample, coefficients)
    _refuse_gradients("gaussian_step_", sample, model_output, uncond_output)
    scale = reduction_scale(reduction, sample)
    chosen = choose("gaussian_step", sample.device.type, sample.dtype)
    if chosen == "reference":
        with torch.no_grad():
            return reference.gaussian_step_(
                sample,
                model_output,
                coefficients,
                steps,
                noise=noise,
                slab=slab,
                uncond_output=uncond_output,
                guidance_scale=guidance_scale,
                reduction=reduction,
            )
    arguments = (sample, model_output, uncond_output, guidance_scale, coefficients, steps, *key, scale)
    buffers = (slab.latents, slab.model_outputs, slab.log_probs)
    if through_dispatcher(sample):
        _gaussian_step_slab_op(*arguments, *buffers)
    else:
        launch(chosen, "gaussian_step", sample, *arguments, sample, None, None, *buffers)
    return None


def check_step(
    sample: Tensor,
    model_output: Tensor,
    coefficients: Tensor,
    steps: Tensor,
    noise: Tensor | NoiseKey,
    uncond_output: Tensor | None,
    guidance_scale: Tensor | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The checks of every form of gaussian_step; the noise as (tensor, seed, sample ids)."""
    check_latents("sample", sample)
    is_double = sample.dtype == torch.float64
    check_operand(
        "model_output", model_output, "sample", sample, sample.shape, FLOATS[3:] if is_double else FLOATS[:3]
    )
    check_transition(coefficients, steps, "sample", sample, may_share_step=True)
    if (uncond_output is None) != (guidance_scale is None):
        given = "guidance_scale" if uncond_output is None else "uncond_output"
        raise ValueError(f"only {given} is given; guidance needs both uncond_output and guidance_scale")
    if uncond_output is not None and guidance_scale is not None:
        check_operand(
            "uncond_output", uncond_output, "model_output", model_output, sample.shape, (model_output.dtype,)
        )
        check_operand("guidance_scale", guidance_scale, "sample", sample, (1,), (torch.float32,))
    return split_noise(noise, "sample", sample)


def check_buffers(
    out: StepOutput, sample: Tensor, model_output: Tensor, uncond_output: Tensor | None
) -> None:
    """The buffers of gaussian_step(out=...): each as the tensor that would have been returned."""
    like = ("sample", sample)
    check_operand("out.prev_sample", out.prev_sample, *like, sample.shape, (sample.dtype,))
    check_operand("out.log_prob", out.log_prob, *like, sample.shape[:1], (arithmetic_dtype(sample),))
    if uncond_output is not None:
        check_operand("out.model_output", out.model_output, *like, sample.shape, (model_output.dtype,))
    _refuse_gradients("gaussian_step(out=...)", sample, model_output, uncond_output)


def _check_slab(slab: TrajectorySlab, sample: Tensor, coefficients: Tensor) -> None:
    steps, dtype = coefficients.shape[0], arithmetic_dtype(sample)
    narrow = FLOATS[:3] if sample.dtype == torch.float32 else (sample.dtype,)
    outputs = FLOATS[3:] if sample.dtype == torch.float64 else FLOATS[:3]
    like = ("sample", sample)
    check_operand("slab.latents", slab.latents, *like, (steps + 1, *sample.shape), narrow)
    check_operand("slab.model_outputs", slab.model_outputs, *like, (steps, *sample.shape), outputs)
    check_operand("slab.log_probs", slab.log_probs, *like, (steps, sample.shape[0]), (dtype,))


def _refuse_gradients(form: str, *inputs: Tensor | None) -> None:
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in inputs):
        raise ValueError(
            f"{form} has no gradients but an input requires them; call it under torch.no_grad(), "
            "or use gaussian_step without buffers"
        )


@torch.library.custom_op(
    "lacfast::gaussian_step_slab", mutates_args=("sample", "latents", "model_outputs", "log_probs")
)
def _gaussian_step_slab_op(
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
    latents: Tensor,
    model_outputs: Tensor,
    log_probs: Tensor,
) -> None:
    arguments = (sample, model_output, uncond_output, guidance_scale, coefficients, steps)
    chosen = choose("gaussian_step", sample.device.type, sample.dtype)
    key = (noise, seed, sample_ids)
    outputs = (sample, None, None, latents, model_outputs, log_probs)
    launch(chosen, "gaussian_step", sample, *arguments, *key, scale, *outputs)


@torch.library.custom_op(
    "lacfast::gaussian_step_out", mutates_args=("prev_sample", "log_prob", "guided_output")
)
def gaussian_step_out_op(
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
    prev_sample: Tensor,
    log_prob: Tensor,
    guided_output: Tensor | None,
) -> None:
    arguments = (sample, model_output, uncond_output, guidance_scale, coefficients, steps)
    chosen = choose("gaussian_step", sample.device.type, sample.dtype)
    outputs = (prev_sample, log_prob, guided_output)
    launch(chosen, "gaussian_step", sample, *arguments, noise, seed, sample_ids, scale, *outputs)


@_gaussian_step_slab_op.register_fake
def _(*arguments: object) -> None:
    return None


@gaussian_step_out_op.register_fake
def _(*arguments: object) -> None:
    return None
