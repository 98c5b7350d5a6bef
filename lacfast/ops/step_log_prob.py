"""step_log_prob: the log-probability of a transition that is given, for trainers that keep their own loop."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lacfast import reference
from lacfast.ops.checks import (
    FLOATS,
    check_latents,
    check_operand,
    check_transition,
    once_per_layout,
    reduction_scale,
)
from lacfast.ops.op import Op, Sized


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
    _check(sample, model_output, prev_sample, coefficients, steps)
    scale = reduction_scale(reduction, sample)
    chosen = STEP_LOG_PROB.chosen(sample)
    if chosen == "reference":
        return reference.step_log_prob(
            sample, model_output, prev_sample, coefficients, steps, reduction=reduction
        )
    inputs = StepLogProb(sample, model_output, prev_sample, coefficients, steps, scale)
    return STEP_LOG_PROB(chosen, inputs).log_prob


@once_per_layout
def _check(
    sample: Tensor, model_output: Tensor, prev_sample: Tensor, coefficients: Tensor, steps: Tensor
) -> None:
    check_latents("sample", sample)
    like = ("sample", sample, sample.shape, FLOATS[3:] if sample.dtype == torch.float64 else FLOATS[:3])
    check_operand("model_output", model_output, *like)
    check_operand("prev_sample", prev_sample, *like)
    check_transition(coefficients, steps, "sample", sample, may_share_step=True)


class StepLogProb(NamedTuple):
    sample: Sized
    model_output: Tensor
    prev_sample: Tensor
    coefficients: Sized
    steps: Sized
    scale: float


class StepLogProbOutputs(NamedTuple):
    log_prob: Tensor


def _allocate(inputs: StepLogProb) -> StepLogProbOutputs:
    return StepLogProbOutputs(inputs.coefficients.new_empty(inputs.sample.shape[0]))


STEP_LOG_PROB = Op(
    "step_log_prob",
    StepLogProb,
    StepLogProbOutputs,
    _allocate,
    triton=("step_log_prob", "step_log_prob"),
    gradients=("sample", "model_output", "prev_sample"),
    # The steps too: autograd then notices a counter that was advanced in between.
    keeps=("sample", "model_output", "prev_sample", "coefficients", "steps"),
)
