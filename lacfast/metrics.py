"""What a run logs: one JSON object per line, and the per-step diagnostics that go into it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lacfast import reference
from lacfast.advantages import Advantages, RewardNormalizer, stack_rewards
from lacfast.records import PPOStats, Rollout
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
    """Rewards per head, and values, explained variance and advantages per trained step."""
    metrics: dict[str, Any] = {
        f"reward/{name}": float(rewards.mean()) for name, rewards in rollout.rewards.items()
    } | {f"reward_std/{name}": float(rewards.std()) for name, rewards in rollout.rewards.items()}
    metrics |= advantages.metrics
    metrics["advantage_mean"] = advantages.raw.mean(dim=(1, 2))
    metrics["advantage_std"] = advantages.raw.std(dim=(1, 2))
    heads = advantages.raw.shape[-1]
    if heads > 1:
        metrics["advantage_correlation"] = torch.corrcoef(advantages.raw.flatten(0, 1).T)
    if rollout.values.shape[-1] == 0:
        return metrics
    values = rollout.values[advantages.steps]
    returns = normalizer.standardize(stack_rewards(rollout)).expand_as(values)
    metrics["value_mean"] = values.mean(dim=(1, 2))
    metrics["value_std"] = values.std(dim=1).mean(dim=-1)
    variance = reference.explained_variance(values.transpose(0, 1), returns.transpose(0, 1))
    metrics["explained_variance"] = variance.mean(dim=-1)
    if heads > 1:
        names = list(rollout.rewards) if normalizer.heads is None else normalizer.heads.names
        losses = (values - advantages.targets).square().mean(dim=(0, 1))
        for head, name in enumerate(names):
            metrics[f"value_loss/{name}"] = float(losses[head])
            metrics[f"explained_variance/{name}"] = variance[:, head]
            metrics[f"advantage_std/{name}"] = advantages.raw[..., head].std(dim=1)
    return metrics


def policy_metrics(stats: PPOStats, steps: Tensor) -> dict[str, Any]:
    """Ratio, clip fractions and KL of one optimizer step, as means per trained step (K,); NaN if empty."""
    sums = stats.step_sums[steps]
    log_ratio, kl_old, kl_ref, high, low = (sums[:, 1:] / sums[:, :1]).unbind(dim=1)
    return {
        "log_ratio": log_ratio,
        "clip_fraction_high": high,
        "clip_fraction_low": low,
        "kl_old": kl_old,
        "kl_ref": kl_ref,
        "mean_kl_old": float(stats.kl_old.mean()),
        "max_abs_log_ratio": float(stats.log_ratio.abs().max()),
    }
