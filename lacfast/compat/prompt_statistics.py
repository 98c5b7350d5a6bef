"""flow_grpo's reward statistics per prompt, without a search through all prompts for every prompt."""

from __future__ import annotations

from collections.abc import Sequence

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
        dists: npt.ArrayLike | str | None = None,
        type: str = "grpo",  # noqa: A002 - the original's keyword
    ) -> npt.NDArray[np.float64]:
        """Take in rewards and return advantages of their shape.

            "grpo": (R - mean of the prompt's rewards) / (std + 1e-4)        "rwr": R
            "sft": 1 for a prompt's best of this batch, else 0
            "dpo": +1 for the best, -1 for the worst of this batch, else 0
            "gardo": R - mean of the prompt's rewards, times the novelty where that is positive: the sample's
                cosine distance to the nearest other one of its prompt, over the mean of those

        Args:
            prompts: (n,)
            rewards: (n,) or, one per step, (n, T); (n,) for "dpo".
            dists: (n, D) features of the images, for "gardo" alone. A word here is the type, which stood in
                this place in earlier versions.
            type: one of the above.

        Raises:
            ValueError: an unknown type, lengths that differ, "dpo" or "gardo" without a pair to compare, or
                features that would be ignored.
        """
        kind = dists if isinstance(dists, str) else type
        features = None if isinstance(dists, str) else dists
        known = ("grpo", "rwr", "sft", "dpo", "gardo")
        if not (isinstance(kind, str) and kind in known):
            raise ValueError(f"unknown type {kind!r}; known: {', '.join(map(repr, known))}")
        scores = np.asarray(rewards, dtype=np.float64)
        names, group, counts = np.unique(np.asarray(prompts), return_inverse=True, return_counts=True)
        if len(group) != len(scores):
            raise ValueError(f"got {len(group)} prompts and {len(scores)} rewards; they must match")
        if (features is None) != (kind != "gardo"):
            raise ValueError(
                f"type={kind!r} {'needs' if features is None else 'would ignore'} dists, the features; "
                "pass both dists=... and type='gardo', or neither"
            )
        starts = np.cumsum(counts) - counts
        order = np.argsort(group, kind="stable")
        for name, part in zip(names.tolist(), np.split(scores[order], starts[1:]), strict=True):
            self.stats[name] = np.concatenate([self.stats[name], part]) if name in self.stats else part
            self.history_prompts.add(name)
        if kind == "rwr":
            return scores.copy()
        if kind == "grpo":
            mean, std = self._moments(names.tolist())
            scale = scores.std(axis=0, keepdims=True) if self.global_std else std[group]
            return np.asarray((scores - mean[group]) / (scale + 1e-4))
        if kind == "sft":
            best = np.maximum.reduceat(scores[order].reshape(len(scores), -1).max(axis=1), starts)
            return np.asarray(scores == best[group].reshape(-1, *[1] * (scores.ndim - 1)), dtype=np.float64)
        groups = np.split(order, starts[1:])
        if features is None:
            return _best_and_worst(scores, groups)
        centred = scores - self._moments(names.tolist())[0][group]
        novelty = _novelty(np.asarray(features, dtype=np.float64), groups)
        return np.where(centred < 0, centred, centred * novelty.reshape(-1, *[1] * (scores.ndim - 1)))

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


def _novelty(
    features: npt.NDArray[np.float64], groups: list[npt.NDArray[np.intp]]
) -> npt.NDArray[np.float64]:
    """(n,) the cosine distance to the nearest other sample of the group, over the group's mean of it."""
    if min(len(rows) for rows in groups) < 2 or len(features) != sum(map(len, groups)):
        raise ValueError(
            "'gardo' compares samples of one prompt: pass dists (n, D) with at least two for every prompt"
        )
    directions = features / np.linalg.norm(features, axis=1, keepdims=True)
    novelty = np.ones(len(features))
    for rows in groups:
        distances = 1 - np.clip(directions[rows] @ directions[rows].T, -1, 1)
        np.fill_diagonal(distances, np.inf)
        nearest = distances.min(axis=1)
        # Samples that are all the same are as novel as each other.
        if nearest.mean() > 0:
            novelty[rows] = nearest / nearest.mean()
    return novelty


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
