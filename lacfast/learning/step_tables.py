"""What an update reads of a transition table, on the device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lacfast.config import PPOConfig
from lacfast.ops.checks import arithmetic_dtype
from lacfast.records import Static, TransitionTable
from lacfast.schedule import forward_rows, kl_gains
from lacfast.transfer import to_device


@dataclass(frozen=True)
class StepTables(Static):
    """Columns of a transition table that the update reads, on the device."""

    coefficients: Tensor
    """(T, 3)"""
    timesteps: Tensor
    """(T,)"""
    weights: Tensor
    """(T,) of the steps in the policy's loss."""
    kl_gains: Tensor
    """(T,) of the squared difference to the anchor."""
    forward: Tensor | None = None
    """(T, 5) of lacfast.schedule.forward_rows, for a loss on the forward process."""


def step_tables(
    table: TransitionTable, config: PPOConfig, like: Tensor, *, forward: bool = False
) -> StepTables:
    """The tables for latents `like`, in the dtype of their maths; `forward` too for a loss that reads it."""
    dtype, kind = arithmetic_dtype(like), "exact" if config.kl is None else config.kl.kind
    return StepTables(
        coefficients=table.coefficients(like.device, dtype),
        timesteps=to_device(table.timesteps, like.device),
        weights=to_device(step_weights(table, balanced=config.balance_steps), like.device, dtype),
        kl_gains=kl_gains(table, kind, device=like.device, dtype=dtype),
        forward=to_device(forward_rows(table), like.device, dtype) if forward else None,
    )


def step_weights(table: TransitionTable, *, balanced: bool) -> Tensor:
    """(T,) weight of each step in the policy loss, 1 on average over the trained ones; see balance_steps."""
    if not balanced:
        return torch.ones_like(table.std)
    weights = table.std / table.b.abs()
    return weights / weights[table.trainable_steps].mean()
