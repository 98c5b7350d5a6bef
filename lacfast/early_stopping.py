"""When a run stops because its held-out score no longer rises."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any


@dataclass
class EarlyStopping:
    """The best score so far and how many evaluations it is old."""

    patience: int
    """Evaluations without a better score before it stops; 0: never."""
    min_improvement: float = 0.0
    """By how much a better score must be better."""
    best: float = -math.inf
    evaluations_since_best: int = 0

    def update(self, score: float) -> None:
        """Take in the score of an evaluation; a score that is not finite is not better."""
        if score > self.best + self.min_improvement:
            self.best, self.evaluations_since_best = score, 0
        else:
            self.evaluations_since_best += 1

    @property
    def is_exhausted(self) -> bool:
        return 0 < self.patience <= self.evaluations_since_best

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` needs."""
        return asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a `state_dict`, with this run's own patience."""
        self.best, self.evaluations_since_best = state["best"], state["evaluations_since_best"]
