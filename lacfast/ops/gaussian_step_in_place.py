"""gaussian_step_: a sample moved in place, its transition kept in slices of a slab.

Nothing of latent size is allocated, so a captured graph replays this on the same addresses. It has no
gradients.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from lacfast import reference
from lacfast.ops.backend import add_kernel, chosen_for, launch, through_dispatcher
from lacfast.ops.checks import (
    FLOATS,
    arithmetic_dtype,
    check_operand,
    check_step,
    once_per_layout,
    reduction_scale,
    split_noise,
)
from lacfast.ops.gaussian_step import GaussianStep
from lacfast.ops.op import schema_of, words_format
from lacfast.records import NoiseKey, TrajectorySlab


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
    key = split_noise(noise)
    check_step(sample, model_output, coefficients, steps, uncond_output, guidance_scale, *key)
    kept = Slab(slab.latents, slab.model_outputs, slab.log_probs)
    _check_slab(sample, coefficients, *kept)
    _refuse_gradients(sample, model_output, uncond_output)
    scale = reduction_scale(reduction, sample)
    chosen = chosen_for(_NAME, sample)
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
    inputs = GaussianStep(
        sample, model_output, uncond_output, guidance_scale, coefficients, steps, *key, scale
    )
    if through_dispatcher(sample):
        _registered(*inputs, *kept)
    else:
        launch(chosen, _NAME, sample, inputs, kept)
    return None


@once_per_layout
def _check_slab(
    sample: Tensor, coefficients: Tensor, latents: Tensor, model_outputs: Tensor, log_probs: Tensor
) -> None:
    steps, dtype = coefficients.shape[0], arithmetic_dtype(sample)
    narrow = FLOATS[:3] if sample.dtype == torch.float32 else (sample.dtype,)
    outputs = FLOATS[3:] if sample.dtype == torch.float64 else FLOATS[:3]
    like = ("sample", sample)
    check_operand("slab.latents", latents, *like, (steps + 1, *sample.shape), narrow)
    check_operand("slab.model_outputs", model_outputs, *like, (steps, *sample.shape), outputs)
    check_operand("slab.log_probs", log_probs, *like, (steps, sample.shape[0]), (dtype,))


def _refuse_gradients(*inputs: Tensor | None) -> None:
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in inputs):
        raise ValueError(
            "gaussian_step_ has no gradients but an input requires them; call it under torch.no_grad(), "
            "or use gaussian_step"
        )


class Slab(NamedTuple):
    """TrajectorySlab as the kernels fill it."""

    latents: Tensor
    model_outputs: Tensor
    log_probs: Tensor


_NAME = "gaussian_step_in_place"
_MUTATED = ("sample", *Slab._fields)
add_kernel(_NAME, (words_format(GaussianStep), words_format(Slab)), triton=("gaussian_step",))


@torch.library.custom_op(
    f"lacfast::{_NAME}",
    mutates_args=_MUTATED,
    schema=f"({', '.join(schema_of(GaussianStep, Slab, mutates=_MUTATED))}) -> ()",
)
def _registered(*fields: Any) -> None:
    inputs, kept = GaussianStep(*fields[: -len(Slab._fields)]), Slab(*fields[-len(Slab._fields) :])
    sample = inputs.sample
    launch(chosen_for(_NAME, sample), _NAME, sample, inputs, kept)


@_registered.register_fake
def _(*fields: Any) -> None:
    return None
