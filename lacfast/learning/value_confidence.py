"""Where a critic explains enough for its values to be bootstrapped from: the gate of lambda."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from lacfast.learning.value_bounds import ValueBounds


@dataclass
class ValueConfidence:
    """The critic's score per step, a running average over rollouts taken before it learned from them."""

    bounds: ValueBounds | None = None
    """None: floor 0 and ceiling 1, so the score is the explained variance."""
    explained_variance: Tensor | None = None
    """(T, M) running average, None before the first rollout."""
    decay: float = 0.8
    """Decay of the average per rollout: one rollout's figure is noisy."""

    def update(self, explained_variance: Tensor) -> None:
        """Take in (T, M) of a rollout that the critic has not learned from."""
        fresh = explained_variance.detach().double().cpu()
        old = self.explained_variance
        if old is not None:
            # What is not finite would stay in the average for good.
            moved = torch.lerp(fresh, old.double(), self.decay)
            fresh = torch.where(fresh.isfinite(), moved, old.double())
        self.explained_variance = fresh

    def scores(self, num_steps: int) -> Tensor:
        """(T,) mean over the rewards, -inf where nothing is known."""
        if self.explained_variance is None:
            return torch.full((num_steps,), -math.inf).double()
        variance = self.explained_variance
        score = variance if self.bounds is None else self.bounds.score(variance)
        return score.mean(dim=-1).nan_to_num(-math.inf)

    def gated_lambda(self, gae_lambda: float, gate: float, num_steps: int) -> Tensor:
        """(T,) float32: gae_lambda where a step's score reaches the gate, else 1, which trusts no value."""
        passed = self.scores(num_steps) >= gate
        return torch.where(passed, gae_lambda, 1.0).float()

    def metrics(self, explained_variance: Tensor) -> dict[str, Any]:
        """Floor, ceiling and score of an explained variance (T, M), means over heads; {} without bounds."""
        if self.bounds is None:
            return {}
        return {
            "explained_variance_floor": float(self.bounds.floor.mean()),
            "explained_variance_ceiling": self.bounds.ceiling.mean(dim=-1),
            "explained_variance_score": self.bounds.score(explained_variance).mean(dim=-1),
        }

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` needs."""
        bounds = None if self.bounds is None else asdict(self.bounds)
        return {"explained_variance": self.explained_variance, "bounds": bounds}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a `state_dict`."""
        found = state["bounds"]
        self.explained_variance = state["explained_variance"]
        # Earlier checkpoints name the measured steps too.
        self.bounds = found and ValueBounds(found["floor"], found["ceiling"], found["images"])
