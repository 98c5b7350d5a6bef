"""From rewards to advantages: statistics, baselines with and without a critic, combination of rewards."""

from lacfast.advantages.critic_baseline import critic_advantages, with_baseline
from lacfast.advantages.estimator import AdvantageEstimator
from lacfast.advantages.multipliers import LagrangeMultipliers
from lacfast.advantages.prompt_statistics import PromptStatistics
from lacfast.advantages.reward_baselines import (
    batch_advantages,
    combined,
    group_advantages,
    prompt_advantages,
    zero_std_groups,
)
from lacfast.records import Advantages
from lacfast.rewards.heads import RewardHeads, stack_rewards
from lacfast.rewards.normalizer import RewardNormalizer

__all__ = [
    "AdvantageEstimator",
    "Advantages",
    "LagrangeMultipliers",
    "PromptStatistics",
    "RewardHeads",
    "RewardNormalizer",
    "batch_advantages",
    "combined",
    "critic_advantages",
    "group_advantages",
    "prompt_advantages",
    "stack_rewards",
    "with_baseline",
    "zero_std_groups",
]
