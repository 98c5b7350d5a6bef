"""The peers' reward statistics per prompt, without a search through all prompts for every prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt


class GroupStatTracker:
    """flow_grpo's group statistics: rewards relative to all that a prompt earned since `clear`."""

    def __init__(self, global_std: bool = False) -> None:
        """
        Args:
            global_std: divide by the deviation of the update's whole batch, not of the prompt's rewards.
        """
        self.global_std = global_std
        self.stats: dict[str, npt.NDArray[np.float64]] = {}
        """prompt -> its rewards since `clear`, (n, ...)"""
        self.history_prompts: set[str] = set()
        """Every prompt that was ever seen."""

    def update(
        self,
        prompts: Sequence[str],
        rewards: npt.ArrayLike,
        type: str = "grpo",  # noqa: A002 - the original's keyword
    ) -> npt.NDArray[np.float64]:
        """Take in rewards and return advantages of their shape.

            "grpo": (R - mean of the prompt's rewards) / (std + 1e-4)        "rwr": R
            "sft": 1 for a prompt's best of this batch, else 0
            "dpo": +1 for the best, -1 for the worst of this batch, else 0

        Args:
            prompts: (n,)
            rewards: (n,) or, one per step, (n, T); (n,) for "dpo".
            type: one of the above.

        Raises:
            ValueError: an unknown type, lengths that differ, or "dpo" without a pair to compare.
        """
        known = ("grpo", "rwr", "sft", "dpo")
        if not (isinstance(type, str) and type in known):
            raise ValueError(f"unknown type {type!r}; known: {', '.join(map(repr, known))}")
        scores = np.asarray(rewards, dtype=np.float64)
        names, group, counts = np.unique(np.asarray(prompts), return_inverse=True, return_counts=True)
        if len(group) != len(scores):
            raise ValueError(f"got {len(group)} prompts and {len(scores)} rewards; they must match")
        starts = np.cumsum(counts) - counts
        order = np.argsort(group, kind="stable")
        for name, part in zip(names.tolist(), np.split(scores[order], starts[1:]), strict=True):
            self.stats[name] = np.concatenate([self.stats[name], part]) if name in self.stats else part
            self.history_prompts.add(name)
        if type == "rwr":
            return scores.copy()
        if type == "grpo":
            mean, std = self._moments(names.tolist())
            scale = scores.std(axis=0, keepdims=True) if self.global_std else std[group]
            return np.asarray((scores - mean[group]) / (scale + 1e-4))
        if type == "sft":
            best = np.maximum.reduceat(scores[order].reshape(len(scores), -1).max(axis=1), starts)
            return np.asarray(scores == best[group].reshape(-1, *[1] * (scores.ndim - 1)), dtype=np.float64)
        return _best_and_worst(scores, np.split(order, starts[1:]))

    def _moments(self, names: list[str]) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """Mean and population deviation of each prompt's kept rewards."""
        kept = [self.stats[name] for name in names]
        lengths = np.array([len(rewards) for rewards in kept])
        starts, every = np.cumsum(lengths) - lengths, np.concatenate(kept)
        divisor = lengths.reshape(-1, *[1] * (every.ndim - 1))
        mean = np.add.reduceat(every, starts, axis=0) / divisor
        squared = (every - np.repeat(mean, lengths, axis=0)) ** 2
        return mean, np.sqrt(np.add.reduceat(squared, starts, axis=0) / divisor)

    def get_stats(self) -> tuple[float, int]:
        """Mean number of rewards per prompt since `clear`, and how many prompts were ever seen."""
        sizes = [len(rewards) for rewards in self.stats.values()]
        return (sum(sizes) / len(sizes) if sizes else 0, len(self.history_prompts))

    def clear(self) -> None:
        """Forget the rewards; the prompts seen stay counted."""
        self.stats = {}


def _best_and_worst(
    scores: npt.NDArray[np.float64], groups: list[npt.NDArray[np.intp]]
) -> npt.NDArray[np.float64]:
    """+1 and -1 for the best and the worst of each group; the second and the first where all are equal."""
    if scores.ndim != 1 or min(len(rows) for rows in groups) < 2:
        raise ValueError(
            "'dpo' compares samples of one prompt: pass rewards (n,) with at least two for every prompt"
        )
    advantages = np.zeros_like(scores)
    for rows in groups:
        best, worst = scores[rows].argmax(), scores[rows].argmin()
        if best == worst:
            best, worst = np.intp(1), np.intp(0)
        advantages[rows[best]], advantages[rows[worst]] = 1.0, -1.0
    return advantages


class BufferedStatTracker:
    """ddpo-pytorch's PerPromptStatTracker: rewards relative to the prompt's last `buffer_size` ones.

    Until a prompt has `min_count` rewards, its advantages are relative to the batch. All prompts' buffers
    are rows of one ring buffer, so an update has no loop over prompts.
    """

    def __init__(self, buffer_size: int, min_count: int) -> None:
        """
        Args:
            buffer_size: rewards kept per prompt.
            min_count: rewards from which on a prompt has a baseline of its own.

        Raises:
            ValueError: when the buffer is empty.
        """
        if buffer_size < 1:
            raise ValueError(f"buffer_size={buffer_size} must be at least 1")
        self.buffer_size = buffer_size
        self.min_count = min_count
        self._rows: dict[str, int] = {}
        self._buffer = np.zeros((0, buffer_size))
        self._seen = np.zeros(0, dtype=np.int64)

    @property
    def stats(self) -> dict[str, npt.NDArray[np.float64]]:
        """prompt -> its kept rewards, in no order."""
        filled = np.minimum(self._seen, self.buffer_size)
        return {prompt: self._buffer[row, : filled[row]] for prompt, row in self._rows.items()}

    def update(self, prompts: Sequence[str], rewards: npt.ArrayLike) -> npt.NDArray[np.floating]:
        """Take in rewards and return (R - mean) / (std + 1e-6), in their dtype (float64 for integers).

        Args:
            prompts: (n,)
            rewards: (n,)

        Raises:
            ValueError: lengths that differ.
        """
        given = np.asarray(rewards)
        scores = given.astype(np.float64)
        if scores.shape != (len(prompts),):
            raise ValueError(f"got {len(prompts)} prompts and rewards {scores.shape}; they must match")
        rows = np.array([self._rows.setdefault(prompt, len(self._rows)) for prompt in prompts], dtype=np.intp)
        self._store(rows, scores)
        mean, std = self._moments()
        young = self._seen[rows] < self.min_count if self.min_count <= self.buffer_size else True
        baseline = np.where(young, scores.mean(), mean[rows])
        scale = np.where(young, scores.std(), std[rows])
        advantages = (scores - baseline) / (scale + 1e-6)
        return advantages.astype(given.dtype if np.issubdtype(given.dtype, np.floating) else np.float64)

    def get_stats(self) -> dict[str, dict[str, float]]:
        """prompt -> mean, std and count of its kept rewards."""
        mean, std = self._moments()
        filled = np.minimum(self._seen, self.buffer_size)
        return {
            prompt: {"mean": float(mean[row]), "std": float(std[row]), "count": int(filled[row])}
            for prompt, row in self._rows.items()
        }

    def state(self) -> dict[str, Any]:
        """What `load_state` needs, in JSON's types."""
        return {
            "prompts": list(self._rows),
            "rewards": self._buffer.tolist(),
            "seen": self._seen.tolist(),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Take over what `state` returned.

        Raises:
            ValueError: when it was kept with another buffer size.
        """
        buffer = np.array(state["rewards"], dtype=np.float64).reshape(len(state["prompts"]), -1)
        if len(buffer) and buffer.shape[1] != self.buffer_size:
            raise ValueError(
                f"the saved statistics have buffer_size={buffer.shape[1]}, these {self.buffer_size}; "
                "use the same"
            )
        self._rows = {prompt: row for row, prompt in enumerate(state["prompts"])}
        self._buffer = buffer if len(buffer) else np.zeros((0, self.buffer_size))
        self._seen = np.array(state["seen"], dtype=np.int64)

    def _store(self, rows: npt.NDArray[np.intp], scores: npt.NDArray[np.float64]) -> None:
        fresh = len(self._rows) - len(self._seen)
        self._buffer = np.concatenate([self._buffer, np.zeros((fresh, self.buffer_size))])
        self._seen = np.concatenate([self._seen, np.zeros(fresh, dtype=np.int64)])
        order = np.argsort(rows, kind="stable")
        counts = np.bincount(rows, minlength=len(self._seen))
        rank = np.empty_like(rows)
        rank[order] = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
        # Of a prompt's rewards in this batch only the last buffer_size stay, so no place is written twice.
        stays = rank >= counts[rows] - self.buffer_size
        places = (self._seen[rows] + rank) % self.buffer_size
        self._buffer[rows[stays], places[stays]] = scores[stays]
        self._seen += counts

    def _moments(self) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """Mean and population deviation of every prompt's kept rewards."""
        filled = np.minimum(self._seen, self.buffer_size)[:, None]
        kept = np.arange(self.buffer_size) < filled
        mean = np.where(kept, self._buffer, 0.0).sum(axis=1, keepdims=True) / filled
        squared = np.where(kept, (self._buffer - mean) ** 2, 0.0).sum(axis=1, keepdims=True)
        return mean[:, 0], np.sqrt(squared / filled)[:, 0]
