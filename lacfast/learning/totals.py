"""Sums of optimizer steps on the device, and their records and metrics on the host."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, Self

import torch
from torch import Tensor

from lacfast.learning.gradient_guard import GradientGuard
from lacfast.learning.step_tables import StepTables
from lacfast.records import PPOStats
from lacfast.runtime.profiling import span

GRAD_NORM = 1
"""Where a record has the norm of the gradient."""


@dataclass(frozen=True)
class Totals:
    """Sums over the microbatches of one optimizer step; the next step takes the same memory."""

    loss: Tensor
    """()"""
    grad_norm: Tensor
    """()"""

    @classmethod
    def create(cls, tables: StepTables) -> Self:
        """Sums at 0, in the dtype of the maths."""
        return cls(*tables.coefficients.new_zeros(2).unbind())

    @property
    def tensors(self) -> list[Tensor]:
        return [getattr(self, each.name) for each in fields(self)]

    @property
    def sums(self) -> list[Tensor]:
        """Sums that add up over ranks."""
        return [self.loss]

    @property
    def maxima(self) -> list[Tensor]:
        """Largest values, of which the largest of all ranks counts."""
        return []

    def zero_(self) -> None:
        for tensor in self.tensors:
            tensor.zero_()

    def record(self) -> Tensor:
        """All sums in the order of the fields, float64: (2,) of the critic, (5 + 6 T,) of the policy."""
        return torch.cat([tensor.double().flatten() for tensor in self.tensors])


@dataclass(frozen=True)
class PolicyTotals(Totals):
    """The sums of the policy, which has diagnostics of every pair."""

    max_abs_log_ratio: Tensor
    """()"""
    abs_log_ratio: Tensor
    """() sum over the pairs."""
    hold_distance: Tensor
    """() mean squared distance of the hold's pairs; 0 without one."""
    step_sums: Tensor
    """(T, 6) as PPOStats.step_sums."""

    @classmethod
    def create(cls, tables: StepTables) -> Self:
        like = tables.coefficients
        loss, norm, largest, total, held = like.new_zeros(5).unbind()
        return cls(loss, norm, largest, total, held, like.new_zeros((len(like), 6)))

    @property
    def sums(self) -> list[Tensor]:
        return [self.loss, self.abs_log_ratio, self.hold_distance, self.step_sums]

    @property
    def maxima(self) -> list[Tensor]:
        return [self.max_abs_log_ratio]

    @torch.no_grad()
    def add(self, loss: Tensor, stats: PPOStats) -> None:
        self.loss.add_(loss)
        distance = stats.log_ratio.abs()
        torch.maximum(self.max_abs_log_ratio, distance.amax(), out=self.max_abs_log_ratio)
        self.abs_log_ratio.add_(distance.sum())
        self.step_sums.add_(stats.step_sums)


@dataclass(frozen=True)
class PolicyRecord:
    """One optimizer step of the policy, on the host."""

    loss: float
    grad_norm: float
    max_abs_log_ratio: float
    mean_abs_log_ratio: float
    """Mean over the pairs that counted."""
    hold_distance: float
    """Mean squared distance of the hold's pairs; 0 without one."""
    step_sums: Tensor
    """(T, 6) as PPOStats.step_sums."""
    pairs: float
    """Pairs that counted."""
    mean_kl_old: float
    """KL per element from the rollout's policy, over the pairs."""
    forward_mismatch: float
    """RMS of b dv / std over the pairs whose whole forward ran; 0 before any step where forwards agree."""

    @staticmethod
    def read(numbers: Tensor, measured: float = math.inf) -> PolicyRecord:
        """The record of a step's PolicyTotals.record (5 + 6 T,) on the host; `measured` pairs ran whole."""
        loss, grad_norm, max_abs_log_ratio, abs_log_ratio, hold_distance = numbers[:5].tolist()
        step_sums = numbers[5:].view(-1, 6)
        pairs = max(float(step_sums[:, 0].sum()), 1.0)
        mean_kl_old = float(step_sums[:, 2].sum()) / pairs
        return PolicyRecord(
            loss=loss,
            grad_norm=grad_norm,
            max_abs_log_ratio=max_abs_log_ratio,
            mean_abs_log_ratio=abs_log_ratio / pairs,
            hold_distance=hold_distance,
            step_sums=step_sums,
            pairs=pairs,
            mean_kl_old=mean_kl_old,
            forward_mismatch=math.sqrt(2 * mean_kl_old * pairs / min(measured, pairs)),
        )


@dataclass(frozen=True)
class CriticRecord:
    """One optimizer step of the critic, on the host."""

    loss: float
    grad_norm: float
    pairs: int

    @staticmethod
    def read(numbers: Tensor, pairs: int) -> CriticRecord:
        """The record of a step's Totals.record (2,) on the host, of a minibatch of `pairs`."""
        loss, grad_norm = numbers.tolist()
        return CriticRecord(loss, grad_norm, pairs)


class UpdateRecords:
    """Records of the optimizer steps on one rollout: on the device until they are read, all at once."""

    def __init__(self, *, forward: bool = False) -> None:
        """`forward`: the policy learns by a loss on the forward process, which has metrics of its own."""
        self._policy_metrics = forward_metrics if forward else ppo_metrics
        self.policy: list[PolicyRecord] = []
        """Records of the steps that were read and taken, in their order."""
        self.critic: list[CriticRecord] = []
        """Records of the critic's steps."""
        self.policy_steps = 0
        """Read or not."""
        self._left_out: Counter[str] = Counter()
        self._pending: list[tuple[Tensor, GradientGuard, Callable[[Tensor], None]]] = []

    def add_policy(self, numbers: Tensor, guard: GradientGuard, *, measured: float = math.inf) -> None:
        """Take in a step's PolicyTotals.record; `measured` of its pairs ran in full, at most all."""
        self.policy_steps += 1
        self._pending.append(
            (numbers, guard, lambda host: self.policy.append(PolicyRecord.read(host, measured)))
        )

    def add_critic(self, numbers: Tensor, guard: GradientGuard, *, pairs: int) -> None:
        """Take in the Totals.record of a critic's step on `pairs` pairs."""
        self._pending.append(
            (numbers, guard, lambda host: self.critic.append(CriticRecord.read(host, pairs)))
        )

    def read(self) -> None:
        """Copy everything to the host.

        Raises:
            FloatingPointError: by a guard. The steps before have been read.
        """
        if not self._pending:
            return
        pending, self._pending = self._pending, []
        with span("sync"):
            flat = torch.cat([numbers for numbers, *_ in pending]).cpu()
        parts = torch.split(flat, [len(numbers) for numbers, *_ in pending])
        for part, (_, guard, take) in zip(parts, pending, strict=True):
            if guard.admits(float(part[GRAD_NORM])):
                take(part)
            else:
                self._left_out[guard.what] += 1
        for guard in {guard for _, guard, _ in pending}:
            guard.settle()

    def metrics(self) -> dict[str, Any]:
        """Means over all optimizer steps that were taken, some per denoising step; see `left_out`."""
        metrics = self._policy_metrics(self.policy) if self.policy else {}
        if self.critic:
            pairs = sum(record.pairs for record in self.critic)
            metrics["value_loss"] = sum(record.loss * record.pairs for record in self.critic) / pairs
            metrics["critic_grad_norm"] = sum(record.grad_norm for record in self.critic) / len(self.critic)
        return metrics | self.left_out()

    @property
    def hold_distance(self) -> float:
        """Mean squared distance of the hold over the policy's optimizer steps that were taken."""
        return sum(record.hold_distance for record in self.policy) / len(self.policy)

    def left_out(self) -> dict[str, int]:
        """How many steps of what were left out, {} where none was."""
        return {f"bad_gradients/{what}": count for what, count in self._left_out.items()}


def ppo_metrics(records: Sequence[PolicyRecord]) -> dict[str, Any]:
    """Ratio, clip fractions, KL over all optimizer steps, some per denoising step (T,); NaN where untrained.

    The loss is the mean over pairs, the gradient norm that over optimizer steps. The first optimizer step's
    largest |log_ratio| is the mismatch of rollout and update; the last one's KL is what kl_limit compares.
    """
    sums = torch.stack([record.step_sums for record in records]).sum(dim=0)
    log_ratio, kl_old, kl_ref, high, low = (sums[:, 1:] / sums[:, :1]).unbind(dim=1)
    return {
        **_shared_metrics(records),
        "log_ratio": log_ratio,
        "clip_fraction_high": high,
        "clip_fraction_low": low,
        "kl_old": kl_old,
        "kl_ref": kl_ref,
        "mean_kl_old": float(sums[:, 2].sum()) / sum(record.pairs for record in records),
        "last_kl_old": records[-1].mean_kl_old,
        "first_max_abs_log_ratio": records[0].max_abs_log_ratio,
        "first_mean_abs_log_ratio": records[0].mean_abs_log_ratio,
        "first_kl_old": records[0].mean_kl_old,
        # RMS of b dv / std before any step: how far the update's forward is from the rollout's.
        "forward_mismatch": records[0].forward_mismatch,
        "max_abs_log_ratio": max(record.max_abs_log_ratio for record in records),
    }


def forward_metrics(records: Sequence[PolicyRecord]) -> dict[str, Any]:
    """Squared distances per element from the old policy's and the anchor's output per denoising step (T,), of
    a loss on the forward process; NaN where untrained."""
    sums = torch.stack([record.step_sums for record in records]).sum(dim=0)
    from_old, from_anchor = (sums[:, 2:4] / sums[:, :1]).unbind(dim=1)
    return {**_shared_metrics(records), "distance_old": from_old, "kl_ref": from_anchor}


def _shared_metrics(records: Sequence[PolicyRecord]) -> dict[str, Any]:
    """Loss, the mean over pairs, and gradient norm, the mean over optimizer steps."""
    pairs = sum(record.pairs for record in records)
    return {
        "policy_loss": sum(record.loss * record.pairs for record in records) / pairs,
        "policy_grad_norm": sum(record.grad_norm for record in records) / len(records),
    }
