"""What a run logs: one JSON object per line, and the per-step diagnostics that go into it."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lacfast import reference
from lacfast.advantages import Advantages, RewardNormalizer, stack_rewards
from lacfast.graph import GraphStatistics
from lacfast.optimizers import require_finite
from lacfast.profiling import span
from lacfast.records import Evaluation, Rollout
from lacfast.trackers import Tracker, curve_points


class MetricsLog:
    """Appends to a JSONL file, flushed line by line so that a killed run keeps what it logged."""

    def __init__(self, path: Path | None, trackers: Sequence[Tracker] = ()) -> None:
        """`path` None keeps no file; `trackers` get the numbers besides.

        Raises:
            ValueError: when the file cannot be written.
        """
        self.trackers = tuple(trackers)
        self._file = None
        if path is not None:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                self._file = path.open("a", encoding="utf-8")
            except OSError as error:
                raise ValueError(
                    f"cannot write metrics to {path}: {error.strerror}; choose a writable directory"
                ) from error

    def write(self, phase: str, iteration: int, **values: Any) -> None:
        for tracker in self.trackers:
            tracker.numbers(iteration, curve_points(phase, values))
        if self._file is not None:
            entry = {"phase": phase, "iteration": iteration, **values}
            self._file.write(json.dumps(entry, default=_plain) + "\n")
            self._file.flush()

    def close(self) -> None:
        for tracker in self.trackers:
            tracker.close()
        if self._file is not None:
            self._file.close()


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.tolist()
    raise TypeError(f"cannot log a {type(value).__name__}")


def rollout_metrics(rollout: Rollout, advantages: Advantages, normalizer: RewardNormalizer) -> dict[str, Any]:
    """Rewards per head; values and explained variance per denoising step (T,), advantages too where trained.

    Row k is step k whichever steps an iteration trains: those of a window that moves, NaN elsewhere.
    """
    steps, num_steps = advantages.steps, rollout.table.num_steps
    metrics: dict[str, Any] = {
        f"reward/{name}": float(rewards.mean()) for name, rewards in rollout.rewards.items()
    } | {f"reward_std/{name}": float(rewards.std()) for name, rewards in rollout.rewards.items()}
    metrics |= advantages.metrics
    metrics["advantage_mean"] = _at_steps(advantages.raw.mean(dim=(1, 2)), steps, num_steps)
    metrics["advantage_std"] = _at_steps(advantages.raw.std(dim=(1, 2)), steps, num_steps)
    heads = advantages.raw.shape[-1]
    if heads > 1:
        metrics["advantage_correlation"] = torch.corrcoef(advantages.raw.flatten(0, 1).T)
    if rollout.values.shape[-1] == 0:
        return metrics
    values = rollout.values
    returns = normalizer.standardize(stack_rewards(rollout)).expand_as(values)
    metrics["value_mean"] = values.mean(dim=(1, 2))
    metrics["value_std"] = values.std(dim=1).mean(dim=-1)
    variance = reference.explained_variance(values.transpose(0, 1), returns.transpose(0, 1))
    metrics["explained_variance"] = variance.mean(dim=-1)
    metrics["value_slope"] = _slope(returns, values).mean(dim=-1)
    raw_errors = (returns - values)[steps] * normalizer.std.to(values)
    metrics["value_loss_raw"] = float(raw_errors.square().mean())
    if heads > 1:
        names = list(rollout.rewards) if normalizer.heads is None else normalizer.heads.names
        losses = (values[steps] - advantages.targets).square().mean(dim=(0, 1))
        for head, name in enumerate(names):
            metrics[f"value_loss/{name}"] = float(losses[head])
            metrics[f"explained_variance/{name}"] = variance[:, head]
            deviations = advantages.raw[..., head].std(dim=1)
            metrics[f"advantage_std/{name}"] = _at_steps(deviations, steps, num_steps)
    return metrics


def _at_steps(trained: Tensor, steps: Tensor, num_steps: int) -> Tensor:
    """(T,) of the numbers (K,) of the trained steps (K,), NaN at the others."""
    return trained.new_full((num_steps,), math.nan).index_copy(0, steps, trained)


def _slope(returns: Tensor, values: Tensor) -> Tensor:
    """Regression slope (K, M) of returns (K, B, M) on values: 1 is calibrated, below 1 overconfident."""
    centred = values - values.mean(dim=1, keepdim=True)
    return (centred * returns).sum(dim=1) / centred.square().sum(dim=1).clamp(min=1e-12)


def evaluation_metrics(evaluation: Evaluation) -> dict[str, Any]:
    """Means and their standard errors, explained variance per step, calibration per head, and diversity."""
    errors = evaluation.standard_errors()
    return {
        "explained_variance": evaluation.explained_variance.mean(dim=-1),
        "diversity": diversity(evaluation.images, evaluation.prompts),
        **evaluation.means(),
        **{f"standard_error/{name}": error for name, error in errors.items()},
        **{f"calibration/{name}": bins for name, bins in evaluation.calibration.items()},
    }


def diversity(images: Tensor, prompts: Sequence[str]) -> float:
    """Mean root mean square distance of two images (B, 3, H, W) of one prompt; NaN where none has two."""
    rows: dict[str, list[int]] = {}
    for row, prompt in enumerate(prompts):
        rows.setdefault(prompt, []).append(row)
    flat = images.flatten(1)
    distances = [
        torch.nn.functional.pdist(flat[members]) / flat.shape[1] ** 0.5
        for members in rows.values()
        if len(members) > 1
    ]
    return float(torch.cat(distances).mean()) if distances else math.nan


def graph_metrics(statistics: GraphStatistics) -> dict[str, Any]:
    """Totals of a run: a number that goes on rising means that something captures again and again."""
    return {
        "graph_captures": statistics.captures,
        "graph_fallbacks": statistics.fallbacks,
        "graph_bytes": statistics.graph_bytes,
    }


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


def compiled_graphs() -> int:
    """Graphs that torch.compile has made in this process so far, whoever asked; still after warm-up."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])
