"""What an update reads of a schedule, and what it sums up on the device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lacfast.config import PPOConfig
from lacfast.ops.checks import arithmetic_dtype
from lacfast.records import PPOStats, TransitionTable
from lacfast.schedule import kl_gains


@dataclass(frozen=True)
class StepTables:
    """What the update reads of a transition table, on the device."""

    coefficients: Tensor
    """(T, 3)"""
    timesteps: Tensor
    """(T,)"""
    weights: Tensor
    """(T,) of the steps in the policy's loss."""
    kl_gains: Tensor
    """(T,) of the squared difference to the reference."""

    @property
    def one(self) -> Tensor:
        """() the share of a minibatch that all of it is."""
        return torch.ones_like(self.coefficients[0, 0])

    def takes(self, other: StepTables) -> bool:
        """Whether other tables fit into this memory."""
        own, theirs = self.coefficients, other.coefficients
        return (own.shape, own.dtype, own.device) == (theirs.shape, theirs.dtype, theirs.device)

    def copy_(self, other: StepTables) -> None:
        """Take over other tables' numbers; what was captured reads them where it read the old ones."""
        for own, theirs in zip(self._tensors, other._tensors, strict=True):
            own.copy_(theirs)

    @property
    def _tensors(self) -> tuple[Tensor, ...]:
        return self.coefficients, self.timesteps, self.weights, self.kl_gains


def step_tables(table: TransitionTable, config: PPOConfig, like: Tensor) -> StepTables:
    """The tables for latents `like`, in the dtype of their maths."""
    dtype = arithmetic_dtype(like)
    return StepTables(
        coefficients=table.coefficients(like.device, dtype),
        timesteps=table.timesteps.to(like.device),
        weights=step_weights(table, balanced=config.balance_steps).to(like.device, dtype),
        kl_gains=kl_gains(table, config.kl, device=like.device, dtype=dtype),
    )


def step_weights(table: TransitionTable, *, balanced: bool) -> Tensor:
    """(T,) weight of each step in the policy loss, 1 on average over the trained ones; see balance_steps."""
    if not balanced:
        return torch.ones_like(table.std)
    weights = table.std / table.b.abs()
    return weights / weights[table.trainable_steps].mean()


@dataclass(frozen=True)
class PolicyTotals:
    """Sums over the microbatches of one optimizer step of the policy; the next step takes the same memory."""

    loss: Tensor
    """()"""
    grad_norm: Tensor
    """()"""
    max_abs_log_ratio: Tensor
    """()"""
    abs_log_ratio: Tensor
    """() sum over the pairs."""
    step_sums: Tensor
    """(T, 6) as PPOStats.step_sums."""

    @staticmethod
    def create(tables: StepTables) -> PolicyTotals:
        like = tables.coefficients
        loss, grad_norm, max_abs_log_ratio, abs_log_ratio = like.new_zeros(4).unbind()
        sums = like.new_zeros((len(like), 6))
        return PolicyTotals(loss, grad_norm, max_abs_log_ratio, abs_log_ratio, sums)

    @property
    def tensors(self) -> list[Tensor]:
        return [self.loss, self.grad_norm, self.max_abs_log_ratio, self.abs_log_ratio, self.step_sums]

    def zero_(self) -> None:
        for tensor in self.tensors:
            tensor.zero_()

    @torch.no_grad()
    def add(self, loss: Tensor, stats: PPOStats) -> None:
        self.loss.add_(loss)
        distance = stats.log_ratio.abs()
        torch.maximum(self.max_abs_log_ratio, distance.amax(), out=self.max_abs_log_ratio)
        self.abs_log_ratio.add_(distance.sum())
        self.step_sums.add_(stats.step_sums)

    def record(self) -> Tensor:
        """(4 + 6 T,) float64: loss, gradient norm, max and sum of |log_ratio|, sums; see PolicyRecord."""
        return torch.cat([tensor.double().flatten() for tensor in self.tensors])


@dataclass(frozen=True)
class CriticTotals:
    """The same for the critic."""

    loss: Tensor
    """()"""
    grad_norm: Tensor
    """()"""

    @staticmethod
    def create(tables: StepTables) -> CriticTotals:
        return CriticTotals(torch.zeros_like(tables.one), torch.zeros_like(tables.one))

    @property
    def tensors(self) -> list[Tensor]:
        return [self.loss, self.grad_norm]

    def zero_(self) -> None:
        for tensor in self.tensors:
            tensor.zero_()

    def record(self) -> Tensor:
        """(2,) float64: loss, gradient norm."""
        return torch.stack(self.tensors).double()
