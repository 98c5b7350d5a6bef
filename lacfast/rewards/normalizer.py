"""Running mean and deviation of what the heads predict: the units of values and advantages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lacfast.records import Rollout
from lacfast.rewards.heads import RewardHeads, stack_rewards
from lacfast.transfer import to_device, to_like

WINDOW = 5000.0
"""Older samples are forgotten at this scale, so that the statistics follow the policy."""
_TINY = 1e-8


@dataclass
class RewardNormalizer:
    """Running mean and standard deviation per head over all samples (Chan et al.'s update).

    M is the number of rewards and of heads; where one head predicts their weighted sum, there is 1.
    """

    mean: Tensor
    """(M,) float64"""
    variance: Tensor
    """(M,) float64, of the population."""
    count: float = 0.0
    """Samples seen, at most `WINDOW`."""
    heads: RewardHeads | None = None
    """What the heads predict; None: each reward as it is."""

    @staticmethod
    def create(num_heads: int, *, heads: RewardHeads | None = None) -> RewardNormalizer:
        zeros = torch.zeros(num_heads).double()
        return RewardNormalizer(zeros, zeros.clone(), 0.0, heads)

    @property
    def std(self) -> Tensor:
        """(M,) float64; 1 for a head whose reward has not varied."""
        std = self.variance.sqrt()
        return torch.where(std > _TINY, std, torch.ones_like(std))

    def head_rewards(self, rewards: Tensor) -> Tensor:
        """Raw reward of each head of rewards (B, M); the head's mean, where a condition fails."""
        return rewards if self.heads is None else self.heads(rewards, self.mean)

    def combined(self, rewards: Tensor) -> Tensor:
        """Raw reward of each head of rewards (B, M) whatever the conditions: what the statistics are of."""
        return rewards if self.heads is None else self.heads.combined(rewards)

    def update(self, rewards: Tensor) -> None:
        """Take in rewards (B, M) of a rollout."""
        batch, batch_count = self.combined(rewards).detach().double(), len(rewards)
        total = self.count + batch_count
        shift = batch.mean(dim=0).cpu() - self.mean
        within = self.count * self.variance + batch_count * batch.var(dim=0, correction=0).cpu()
        self.variance = (within + shift**2 * self.count * batch_count / total) / total
        self.mean = self.mean + shift * batch_count / total
        self.count = min(total, WINDOW)

    def restore(self, other: RewardNormalizer) -> None:
        """Take over another normalizer's statistics."""
        self.mean, self.variance, self.count = other.mean, other.variance, other.count

    def standardize(self, rewards: Tensor) -> Tensor:
        """(B, M) of rewards (B, M), in units of their standard deviation."""
        return (self.head_rewards(rewards) - to_like(self.mean, rewards)) / to_like(self.std, rewards)

    def standardized(self, rollout: Rollout) -> Tensor:
        """(B, M) rewards of a rollout in units of their standard deviation, on its device."""
        return to_device(self.standardize(stack_rewards(rollout)), rollout.latents.device)

    def state_dict(self) -> dict[str, Any]:
        return {"mean": self.mean, "variance": self.variance, "count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.mean, self.variance, self.count = state["mean"], state["variance"], state["count"]
