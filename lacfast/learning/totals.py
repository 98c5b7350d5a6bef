"""What an update reads of a schedule, and what it sums up on the device."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lacfast.learning.optimizers import require_finite
from lacfast.learning.step_tables import StepTables
from lacfast.records import PPOStats
from lacfast.runtime.profiling import span


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


@dataclass(frozen=True)
class PolicyRecord:
    """What one optimizer step of the policy did, on the host; see update.PolicyTotals.record."""

    loss: float
    grad_norm: float
    max_abs_log_ratio: float
    mean_abs_log_ratio: float
    """Over the pairs that counted."""
    step_sums: Tensor
    """(T, 6) as PPOStats.step_sums."""
    pairs: float
    """That counted."""
    mean_kl_old: float
    """KL per element from the rollout's policy, over the pairs."""
    forward_mismatch: float
    """RMS of b dv / std over the pairs whose whole forward ran; 0 before any step where forwards agree."""

    @staticmethod
    def read(numbers: Tensor, measured: float = math.inf) -> PolicyRecord:
        """From the step's record (4 + 6 T,) on the host; `measured` pairs ran in full, at most all."""
        loss, grad_norm, max_abs_log_ratio, abs_log_ratio = numbers[:4].tolist()
        step_sums = numbers[4:].view(-1, 6)
        pairs = max(float(step_sums[:, 0].sum()), 1.0)
        mean_kl_old = float(step_sums[:, 2].sum()) / pairs
        return PolicyRecord(
            loss=loss,
            grad_norm=grad_norm,
            max_abs_log_ratio=max_abs_log_ratio,
            mean_abs_log_ratio=abs_log_ratio / pairs,
            step_sums=step_sums,
            pairs=pairs,
            mean_kl_old=mean_kl_old,
            forward_mismatch=math.sqrt(2 * mean_kl_old * pairs / min(measured, pairs)),
        )


class UpdateRecords:
    """What the optimizer steps on one rollout did: on the device until it is read, all at once."""

    def __init__(self) -> None:
        self.policy: list[PolicyRecord] = []
        """Of the steps that were read, in their order."""
        self.policy_steps = 0
        """Read or not."""
        self._critic: list[tuple[float, float, int]] = []
        self._pending: list[tuple[str, Tensor, int, float]] = []

    def add(self, what: str, numbers: Tensor, pairs: int, *, measured: float = math.inf) -> None:
        """Take in the record of a step of the "policy" or the "critic" on `pairs` pairs.

        Of the policy's, `measured` ran in full, at most all.
        """
        self._pending.append((what, numbers, pairs, measured))
        self.policy_steps += what == "policy"

    def read(self) -> None:
        """Copy everything to the host.

        Raises:
            FloatingPointError: for the first step whose gradient norm is not finite. The steps before it
                have been read.
        """
        if not self._pending:
            return
        with span("sync"):
            flat = torch.cat([numbers for _, numbers, *_ in self._pending]).cpu()
        pending, self._pending = self._pending, []
        for what, numbers, pairs, measured in pending:
            record, flat = flat[: len(numbers)], flat[len(numbers) :]
            require_finite(what, float(record[1]))
            if what == "policy":
                self.policy.append(PolicyRecord.read(record, measured))
            else:
                self._critic.append((float(record[0]), float(record[1]), pairs))

    def metrics(self) -> dict[str, Any]:
        """Means over all optimizer steps; some per denoising step."""
        metrics = policy_metrics(self.policy)
        if self._critic:
            pairs = sum(count for _, _, count in self._critic)
            metrics["value_loss"] = sum(loss * count for loss, _, count in self._critic) / pairs
            metrics["critic_grad_norm"] = sum(norm for _, norm, _ in self._critic) / len(self._critic)
        return metrics


def policy_metrics(records: Sequence[PolicyRecord]) -> dict[str, Any]:
    """Ratio, clip fractions, KL over all optimizer steps, some per denoising step (T,); NaN where untrained.

    The loss is the mean over pairs, the gradient norm that over optimizer steps. The first optimizer step's
    largest |log_ratio| is the mismatch of rollout and update; the last one's KL is what kl_limit compares.
    """
    sums = torch.stack([record.step_sums for record in records]).sum(dim=0)
    log_ratio, kl_old, kl_ref, high, low = (sums[:, 1:] / sums[:, :1]).unbind(dim=1)
    pairs = sum(record.pairs for record in records)
    return {
        "policy_loss": sum(record.loss * record.pairs for record in records) / pairs,
        "policy_grad_norm": sum(record.grad_norm for record in records) / len(records),
        "log_ratio": log_ratio,
        "clip_fraction_high": high,
        "clip_fraction_low": low,
        "kl_old": kl_old,
        "kl_ref": kl_ref,
        "mean_kl_old": float(sums[:, 2].sum()) / pairs,
        "last_kl_old": records[-1].mean_kl_old,
        "first_max_abs_log_ratio": records[0].max_abs_log_ratio,
        "first_mean_abs_log_ratio": records[0].mean_abs_log_ratio,
        "first_kl_old": records[0].mean_kl_old,
        # RMS of b dv / std before any step: how far the update's forward is from the rollout's.
        "forward_mismatch": records[0].forward_mismatch,
        "max_abs_log_ratio": max(record.max_abs_log_ratio for record in records),
    }
