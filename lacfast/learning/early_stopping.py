"""When a run stops because its held-out score no longer rises."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lacfast.config import EarlyStoppingConfig


@dataclass
class EarlyStopping:
    """The best score so far and how many evaluations it is old."""

    score: str
    """What it watches."""
    patience: int
    """Evaluations without a better score before it stops; 0: never."""
    best: float = -math.inf
    evaluations_since_best: int = 0

    @staticmethod
    def create(config: EarlyStoppingConfig, known: Sequence[str]) -> EarlyStopping:
        """A watch on the configured score, one of the `known` ones, whose first is the default.

        Raises:
            ValueError: for a score that no evaluation has.
        """
        score = config.score or known[0]
        if score not in known:
            raise ValueError(
                f"early_stopping.score={score!r} is no score of an evaluation; known: {', '.join(known)}"
            )
        return EarlyStopping(score, config.patience)

    def update(self, score: float) -> None:
        """Take in the score of an evaluation; a score that is not finite is not better."""
        if score > self.best:
            self.best, self.evaluations_since_best = score, 0
        else:
            self.evaluations_since_best += 1

    @property
    def is_exhausted(self) -> bool:
        return 0 < self.patience <= self.evaluations_since_best

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` needs."""
        return {
            "score": self.score,
            "best": self.best,
            "evaluations_since_best": self.evaluations_since_best,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a `state_dict`, with this run's own patience; another score starts anew."""
        if state.get("score", self.score) != self.score:
            return
        self.best, self.evaluations_since_best = state["best"], state["evaluations_since_best"]
