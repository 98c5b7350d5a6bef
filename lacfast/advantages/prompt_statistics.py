"""Running statistics of the rewards per prompt: the baseline of DDPO."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt


class PromptStatistics:
    """Rewards relative to the prompt's last `buffer_size` ones, by ddpo-pytorch's PerPromptStatTracker.

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
