"""The record of log_ratio and ppo_loss, and the two ops that read it."""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor

from lacfast.ops.op import Op, Sized

# Columns: log_ratio, kl_old, kl_ref, clipped | count, three sums, clipped from above, from below |
# a row's share of the loss, and its derivatives by log_ratio and by kl_ref.
ROW_COLUMNS, STEP_COLUMNS, SHARE_COLUMNS = 4, 6, 3


class PPOLoss(NamedTuple):
    """What the loss reads; log_ratio reads the fields without a default."""

    model_output: Sized
    old_model_output: Tensor
    reference_output: Tensor | None
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
    return LogRatioOutputs(inputs.coefficients.new_empty((inputs.model_output.shape[0], 3)))


def _loss(inputs: PPOLoss) -> PPOLossOutputs:
    table, batch = inputs.coefficients, inputs.model_output.shape[0]
    return PPOLossOutputs(
        table.new_empty(()),
        table.new_empty((batch, ROW_COLUMNS)),
        table.new_empty((table.shape[0], STEP_COLUMNS)),
        table.new_empty((batch, SHARE_COLUMNS)),
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
)
