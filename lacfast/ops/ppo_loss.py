"""log_ratio and ppo_loss: PPO's ratio, KLs and loss in innovation form, one read of the latents each way."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from lacfast import reference
from lacfast.config import RATIOS
from lacfast.config.checks import unknown
from lacfast.ops.checks import (
    arithmetic_dtype,
    check_latents,
    check_noise,
    check_operand,
    check_transition,
    once_per_layout,
    reduction_scale,
    split_noise,
)
from lacfast.ops.op import Op, Sized
from lacfast.records import NoiseKey, PPOStats, TransitionTerms
from lacfast.reference.surrogate import Bounds, Clip, bounds

# Columns: log_ratio, kl_old, kl_ref, clipped | count, three sums, clipped from above, from below |
# a row's share of the loss, and its derivatives by log_ratio and by kl_ref.
ROW_COLUMNS, STEP_COLUMNS, SHARE_COLUMNS = 4, 6, 3


class PPOLoss(NamedTuple):
    """What the loss reads; log_ratio reads the fields without a default."""

    model_output: Sized
    old_model_output: Tensor
    anchor_output: Tensor | None
    coefficients: Sized
    steps: Sized
    noise: Tensor | None
    seed: Tensor | None
    sample_ids: Tensor | None
    scale: float
    advantages: Tensor | None = None
    weights: Tensor | None = None
    step_weights: Tensor | None = None
    mask: Tensor | None = None
    kl_gains: Tensor | None = None
    is_normalized: bool = False
    clip_low: float = math.inf
    clip_high: float = math.inf
    dual_clip: float = math.inf
    kl_threshold: float = math.inf
    kl_weight: float = 0.0


class PPOLossOutputs(NamedTuple):
    loss: Tensor
    rows: Tensor
    """(B, 4)"""
    step_sums: Tensor
    """(T, 6)"""
    shares: Tensor
    """(B, 3)"""


class LogRatioOutputs(NamedTuple):
    terms: Tensor
    """(B, 3) log_ratio, kl_old, kl_ref."""


def _terms(inputs: PPOLoss) -> LogRatioOutputs:
    return LogRatioOutputs(inputs.coefficients.new_empty(inputs.model_output.shape[0], 3))


def _loss(inputs: PPOLoss) -> PPOLossOutputs:
    table, batch = inputs.coefficients, inputs.model_output.shape[0]
    # Of sizes in a tuple torch takes half as long again.
    return PPOLossOutputs(
        table.new_empty(()),
        table.new_empty(batch, ROW_COLUMNS),
        table.new_empty(table.shape[0], STEP_COLUMNS),
        table.new_empty(batch, SHARE_COLUMNS),
    )


_TRANSITION = PPOLoss._fields[:8]

LOG_RATIO = Op(
    "log_ratio",
    PPOLoss,
    LogRatioOutputs,
    _terms,
    triton=("ppo_loss", "ppo_gradient"),
    gradients=("model_output",),
    keeps=_TRANSITION,
)
PPO_LOSS = Op(
    "ppo_loss",
    PPOLoss,
    PPOLossOutputs,
    _loss,
    triton=("ppo_loss", "ppo_gradient"),
    gradients=("model_output",),
    keeps=(*_TRANSITION, "kl_gains", "shares"),
    statistics=("rows", "step_sums", "shares"),
    makes_gradient=True,
)


def log_ratio(
    model_output: Tensor,
    old_model_output: Tensor,
    coefficients: Tensor,
    steps: Tensor,
    *,
    noise: Tensor | NoiseKey,
    anchor_output: Tensor | None = None,
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
        anchor_output: (B, ...) of the anchor, like model_output.
        reduction: "mean" over elements or "sum".

    Returns:
        log_ratio, kl_old and kl_ref (0 without an anchor), each (B,) in the dtype of the maths.

    Raises:
        ValueError: a shape, dtype, device or memory order that does not fit.
    """
    key = split_noise(noise)
    transition = (model_output, old_model_output, anchor_output, coefficients, steps, *key)
    _check(*transition)
    scale = reduction_scale(reduction, model_output)
    chosen = LOG_RATIO.chosen(model_output)
    if chosen == "reference":
        return reference.log_ratio(
            model_output,
            old_model_output,
            coefficients,
            steps,
            noise=noise,
            anchor_output=anchor_output,
            reduction=reduction,
        )
    inputs = PPOLoss(*transition, scale)
    return TransitionTerms(*LOG_RATIO(chosen, inputs).terms.unbind(dim=1))


def ppo_loss(
    model_output: Tensor,
    old_model_output: Tensor,
    advantages: Tensor,
    coefficients: Tensor,
    steps: Tensor,
    *,
    noise: Tensor | NoiseKey,
    clip_range: Clip | None = None,
    clip_nats: Clip | None = None,
    kl_threshold: float | None = None,
    dual_clip: float = math.inf,
    ratio: str = "innovation",
    weights: Tensor | None = None,
    step_weights: Tensor | None = None,
    mask: Tensor | None = None,
    anchor_output: Tensor | None = None,
    kl_weight: float = 0.0,
    kl_gains: Tensor | None = None,
    reduction: str = "mean",
) -> tuple[Tensor, PPOStats]:
    """PPO's surrogate over transitions (arXiv 1707.06347, eq. 7), with a KL to the anchor.

        rho  = exp(log_ratio),   log_ratio of "innovation": see log_ratio; of "ratio_norm": reduce( eps b dv )
        loss = mean_i w_i step_weights[step_i] [ -gain(rho, A) + kl_weight kl_ref ]
        gain = min(rho A, clip(rho) A); variants and sources: lacfast.reference.surrogate.surrogate_gain
        kl_ref = reduce( kl_gains[step] (v - v_ref)^2 )

    Exactly one of `clip_range`, `clip_nats` and `kl_threshold` is given. The mean runs over the rows of
    `mask`. Where std = 0 there is no ratio: the row's loss, statistics and gradient are 0.
    Inputs are taken as they are, under autocast too; maths in float32, or float64 for float64. On a GPU one
    call forward and one backward, which draws a key's noise again: nothing of latent size is kept but the
    inputs. On a CPU the forward pass of an eager call makes the gradient too, for the loss's gradient of the
    last backward pass (1 at first), and holds it until its own, so that latents are read and noise is drawn
    once; where that differs the gradient is made anew.

    Args:
        model_output: (B, ...) of the policy that is trained.
        old_model_output: (B, ...) of the policy that made the rollout.
        advantages: (B,) in the dtype of the maths (float32, or float64 for float64 outputs).
        coefficients: (T, 3) columns a, b, std, in the dtype of the maths.
        steps: (B,) int64 row of `coefficients`. Only the CPU kernels notice a row beyond the table.
        noise: (B, ...) the rollout's eps in float32 or the outputs' dtype, or the key that regenerates it.
        clip_range: of the ratio, both sides or (low, high), in the units of `reduction` ("mean": nats per
            element).
        clip_nats: the same on the joint ratio; under "mean", clip_range = clip_nats / N.
        kl_threshold: no clip; drops a pair whose kl_old reaches it and whose ratio moves with A.
        dual_clip: c > 1: gain >= c A where A < 0.
        ratio: "innovation" or "ratio_norm".
        weights: (B,) of the pairs, like advantages. None: 1.
        step_weights: (T,) of the steps, like coefficients. None: 1.
        mask: (B,) bool. False: the row's latents count nothing, whatever they hold. None: all True.
        anchor_output: (B, ...) of the anchor.
        kl_weight: beta, needs `anchor_output`.
        kl_gains: (T,) of lacfast.schedule.kl_gains, like coefficients. None: "exact", b^2 / (2 std^2).
        reduction: "mean" over elements or "sum".

    Returns:
        The loss () and detached statistics. The gradient flows to model_output alone.

    Raises:
        ValueError: a shape, dtype, device or memory order that does not fit; not exactly one of the three
            bounds, or one out of its range; a KL setting without an anchor.
    """
    key = split_noise(noise)
    transition = (model_output, old_model_output, anchor_output, coefficients, steps, *key)
    scale, is_normalized, limits = _check_pairs(
        *(advantages, weights, step_weights, mask, kl_gains, *transition),
        reduction=reduction,
        ratio=ratio,
        clip_range=clip_range,
        clip_nats=clip_nats,
        kl_threshold=kl_threshold,
        dual_clip=dual_clip,
    )
    if anchor_output is None and (kl_weight != 0 or kl_gains is not None):
        raise ValueError(
            f"kl_weight is {kl_weight} but there is no anchor_output; "
            "pass one, or kl_weight=0 and no kl_gains"
        )
    chosen = PPO_LOSS.chosen(model_output)
    if chosen == "reference":
        return reference.ppo_loss(
            model_output,
            old_model_output,
            advantages,
            coefficients,
            steps,
            noise=noise,
            clip_range=clip_range,
            clip_nats=clip_nats,
            kl_threshold=kl_threshold,
            dual_clip=dual_clip,
            ratio=ratio,
            weights=weights,
            step_weights=step_weights,
            mask=mask,
            anchor_output=anchor_output,
            kl_weight=kl_weight,
            kl_gains=kl_gains,
            reduction=reduction,
        )
    inputs = PPOLoss(
        *transition,
        scale,
        advantages,
        weights,
        step_weights,
        mask,
        kl_gains,
        is_normalized,
        limits.clip_low,
        limits.clip_high,
        limits.dual_clip,
        limits.kl_threshold,
        kl_weight,
    )
    outputs = PPO_LOSS(chosen, inputs)
    return outputs.loss, PPOStats(outputs.rows, outputs.step_sums)


@once_per_layout
def _check_pairs(
    advantages: Tensor,
    weights: Tensor | None,
    step_weights: Tensor | None,
    mask: Tensor | None,
    kl_gains: Tensor | None,
    *transition: Tensor,
    reduction: str,
    ratio: str,
    clip_range: Clip | None,
    clip_nats: Clip | None,
    kl_threshold: float | None,
    dual_clip: float,
) -> tuple[float, bool, Bounds]:
    """What `_check` asks of the transition, then the pairs' own operands.

    Returns:
        The settings in the kernel's words: scale, whether the ratio is normalised, and the bounds.
    """
    _check(*transition)
    model_output, coefficients = transition[0], transition[3]
    wide, batch, table = (arithmetic_dtype(model_output),), model_output.shape[:1], coefficients.shape[:1]
    expected = (
        ("advantages", advantages, batch, wide),
        ("weights", weights, batch, wide),
        ("step_weights", step_weights, table, wide),
        ("mask", mask, batch, (torch.bool,)),
        ("kl_gains", kl_gains, table, wide),
    )
    for name, tensor, shape, dtypes in expected:
        if tensor is not None:
            check_operand(name, tensor, "model_output", model_output, shape, dtypes)
    if ratio not in RATIOS:
        raise unknown("ratio", ratio, RATIOS)
    scale = reduction_scale(reduction, model_output)
    limits = bounds(clip_range, clip_nats, kl_threshold, dual_clip, nats_per_unit=1 / scale)
    return scale, ratio == "ratio_norm", limits


@once_per_layout
def _check(
    model_output: Tensor,
    old_model_output: Tensor,
    anchor_output: Tensor | None,
    coefficients: Tensor,
    steps: Tensor,
    *key: Tensor | None,
) -> None:
    check_latents("model_output", model_output)
    like = ("model_output", model_output, model_output.shape, (model_output.dtype,))
    check_operand("old_model_output", old_model_output, *like)
    if anchor_output is not None:
        check_operand("anchor_output", anchor_output, *like)
    check_transition(coefficients, steps, "model_output", model_output)
    check_noise("model_output", model_output, *key)
