"""From raw rewards to what each head of the critic predicts: one each, gated, or their weighted sum."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from lacfast.config import AdvantageConfig
from lacfast.ops.checks import arithmetic_dtype
from lacfast.records import RewardCondition, Rollout
from lacfast.reference.advantages import gated_rewards
from lacfast.transfer import to_like

SCALARIZED = "scalarized"
"""Name of the one head on the weighted sum."""


def stack_rewards(rollout: Rollout) -> Tensor:
    """(B, M) rewards in the order of rollout.rewards, on the host as they come; float64 for such latents."""
    return torch.stack(list(rollout.rewards.values()), dim=1).to("cpu", arithmetic_dtype(rollout.latents))


@dataclass(frozen=True)
class RewardHeads:
    """Heads of a critic over M rewards: one each, gated by one another, or one on their weighted sum.

    A critic's file has them, so that steering makes of the rewards what training made of them.
    """

    rewards: tuple[str, ...]
    """Names of the M rewards."""
    weights: tuple[float, ...]
    """M of them, of the rewards."""
    combination: str = "sum_normalized"
    """AdvantageConfig.combination; "scalarized" has one head on the weighted sum of raw rewards."""
    conditions: tuple[tuple[str, str, float], ...] = ()
    """AdvantageConfig.conditions."""

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
        easy = [condition[0] for condition in config.conditions]
        if len(set(easy)) < len(easy):
            raise ValueError(f"conditions={config.conditions} gate a reward twice; give one for each")
        for easy_name, hard, _ in config.conditions:
            reward_index(names, easy_name), reward_index(names, hard)
        return RewardHeads(tuple(names), tuple(weights.tolist()), config.combination, config.conditions)

    @staticmethod
    def from_json(stored: dict[str, Any]) -> RewardHeads:
        """What `to_json` made, back."""
        conditions = tuple((easy, hard, float(threshold)) for easy, hard, threshold in stored["conditions"])
        return RewardHeads(
            tuple(stored["rewards"]), tuple(stored["weights"]), stored["combination"], conditions
        )

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the heads."""
        return (SCALARIZED,) if self.combination == SCALARIZED else self.rewards

    @property
    def head_weights(self) -> Tensor:
        """Weight of each head's value, (M,) float32; (1,) for the one on a sum that is weighted already."""
        return torch.tensor([1.0] if self.combination == SCALARIZED else self.weights)

    def combined(self, rewards: Tensor) -> Tensor:
        """(B, M) raw rewards as they are; (B, 1) their weighted sum."""
        if self.combination != SCALARIZED:
            return rewards
        return (rewards * to_like(torch.tensor(self.weights), rewards)).sum(dim=1, keepdim=True)

    def __call__(self, rewards: Tensor, mean: Tensor) -> Tensor:
        """Raw reward of each head of rewards (B, M): its mean (M,), where a condition fails."""
        if not self.conditions:
            return self.combined(rewards)
        index = self.rewards.index
        conditions = [
            RewardCondition(reward=index(easy), on=index(hard), threshold=threshold)
            for easy, hard, threshold in self.conditions
        ]
        return gated_rewards(rewards, to_like(mean, rewards), conditions)

    def standardize(self, rewards: Tensor, mean: Tensor, std: Tensor) -> Tensor:
        """What the heads predict of rewards (B, M): (R - mean) / std, 0 where a condition fails."""
        return (self(rewards, mean) - to_like(mean, rewards)) / to_like(std, rewards)


def require_rewards(heads: RewardHeads | None, rewards: Sequence[str], critic: str) -> None:
    """
    Args:
        heads: what a critic predicts. None: it is new, or an earlier version's, which did not say.
        rewards: names of a run's, in the order of its heads.
        critic: its name in the message.

    Raises:
        ValueError: for a critic of other rewards, or of the same in another order.
    """
    if heads is not None and heads.rewards != tuple(rewards):
        raise ValueError(
            f"{critic} is of rewards {list(heads.rewards)}, this run has {list(rewards)}; give those "
            "in their order, or begin with a new critic: backbone.critic = None in Python, without "
            "critic_from on the command line"
        )


def reward_index(names: Sequence[str], name: str) -> int:
    """
    Raises:
        ValueError: when there is no such reward.
    """
    if name not in names:
        raise ValueError(f"there is no reward {name!r} to combine; trained on: {', '.join(names)}")
    return list(names).index(name)
