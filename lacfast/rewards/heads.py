"""From raw rewards to what each head of the critic predicts: one each, gated, or their weighted sum."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lacfast.config import AdvantageConfig
from lacfast.ops.checks import arithmetic_dtype
from lacfast.records import RewardCondition, Rollout

SCALARIZED = "scalarized"
"""Name of the one head on the weighted sum."""


def stack_rewards(rollout: Rollout) -> Tensor:
    """(B, M) rewards in the order of rollout.rewards, on the rollout's device; float64 for such latents."""
    dtype = arithmetic_dtype(rollout.latents)
    return torch.stack(list(rollout.rewards.values()), dim=1).to(rollout.latents.device, dtype)


@dataclass(frozen=True)
class RewardHeads:
    """Heads of a critic over M rewards: one each, gated by one another, or one on their weighted sum."""

    names: tuple[str, ...]
    """M of them, or one under "scalarized"."""
    mixing: Tensor | None = None
    """(M,) weights of the raw rewards in the one head; None: a head for each reward."""
    conditions: tuple[RewardCondition, ...] = ()
    """Easy rewards that count as 0 where a hard one fails."""

    @staticmethod
    def create(names: Sequence[str], weights: Tensor, config: AdvantageConfig) -> RewardHeads:
        """The heads of a combination rule.

        Args:
            names: of the M rewards.
            weights: (M,) of the rewards.
            config: its conditions name rewards.

        Raises:
            ValueError: a condition on a reward that is not trained on, or two on one.
        """
        if config.combination == "scalarized":
            return RewardHeads((SCALARIZED,), weights)
        easy = [condition[0] for condition in config.conditions]
        if len(set(easy)) < len(easy):
            raise ValueError(f"conditions={config.conditions} gate a reward twice; give one for each")
        return RewardHeads(
            tuple(names),
            conditions=tuple(
                RewardCondition(
                    reward=reward_index(names, easy), on=reward_index(names, hard), threshold=threshold
                )
                for easy, hard, threshold in config.conditions
            ),
        )

    def __call__(self, rewards: Tensor) -> Tensor:
        """(B, M) of raw rewards (B, M); (B, 1) on their weighted sum."""
        if self.mixing is not None:
            return (rewards * self.mixing.to(rewards)).sum(dim=1, keepdim=True)
        gated = rewards.clone()
        for condition in self.conditions:
            passed = rewards[:, condition.on] >= condition.threshold
            gated[:, condition.reward] = torch.where(passed, rewards[:, condition.reward], 0.0)
        return gated


def reward_index(names: Sequence[str], name: str) -> int:
    """
    Raises:
        ValueError: when there is no such reward.
    """
    if name not in names:
        raise ValueError(f"there is no reward {name!r} to combine; trained on: {', '.join(names)}")
    return list(names).index(name)
