"""Rewards with floors: their weights are Lagrange multipliers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lacfast.config import AdvantageConfig
from lacfast.rewards.heads import reward_index


@dataclass
class LagrangeMultipliers:
    """Weights of rewards with floors, by ascent on the dual of: maximise sum w R where E[R_m] >= floor_m.

        w_m <- clip( w_m + rate (floor_m - mean(R_m)) / std(R_m), 0, maximum )

    A multiplier grows while its reward's mean lies below the floor and falls to 0 above it (Tessler et al.,
    "Reward Constrained Policy Optimization", arXiv 1805.11074); the unit of standard deviations is ours.
    """

    weights: Tensor
    """(M,) float64 weights of the combination: fixed for objectives, multipliers for constraints."""
    floors: Tensor
    """(M,) float64 raw reward that each mean must reach; -inf for an objective."""
    learning_rate: float
    """Per update, in weight per standard deviation."""
    maximum: float = 10.0
    """Bound of a multiplier, for a floor that cannot be reached."""

    @staticmethod
    def create(names: Sequence[str], weights: Tensor, config: AdvantageConfig) -> LagrangeMultipliers:
        """
        Args:
            names: of the M rewards.
            weights: (M,) of the objectives, and the multipliers to begin with.
            config: its floors name rewards.

        Raises:
            ValueError: a floor of a reward that is not trained on, or a negative first multiplier.
        """
        floors = torch.full((len(names),), -math.inf, dtype=torch.float64)
        for name, floor in config.floors:
            index = reward_index(names, name)
            floors[index] = floor
            if weights[index] < 0:
                raise ValueError(
                    f"reward {name!r} has weight {float(weights[index]):g}, but a multiplier is >= 0; "
                    "negate the reward and its floor"
                )
        return LagrangeMultipliers(
            weights.double(), floors, config.multiplier_learning_rate, config.multiplier_maximum
        )

    def update(self, rewards: Tensor, std: Tensor) -> None:
        """Take in rewards (B, M) of one rollout, in units of std (M,)."""
        mean = rewards.detach().double().mean(dim=0).cpu()
        shortfall = (self.floors - mean) / std
        moved = (self.weights + self.learning_rate * shortfall).clamp(0, self.maximum)
        self.weights = torch.where(self.floors.isneginf(), self.weights, moved)
