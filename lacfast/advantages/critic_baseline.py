"""Advantages against the critic's values, or those that take their place."""

from __future__ import annotations

from functools import singledispatch

import torch
from torch import Tensor

from lacfast import ops
from lacfast.config import CriticValues
from lacfast.records import Advantages, Rollout
from lacfast.rewards.heads import stack_rewards
from lacfast.rewards.normalizer import RewardNormalizer
from lacfast.transfer import to_device, to_like


def critic_advantages(
    rollout: Rollout,
    normalizer: RewardNormalizer,
    weights: Tensor,
    *,
    gae_lambda: float | Tensor,
    advantage_clip: float,
    target_clip: float,
    combination: str = "sum_normalized",
) -> Advantages:
    """Advantages from the critic's values, by `ops.normalized_advantages` over the trained steps.

    Args:
        rollout: with rewards.
        normalizer: already updated with this rollout's rewards; it knows what the M heads predict.
        weights: (M,) of the heads.
        gae_lambda: of the policy's advantages, one or (T,) of each step's value; value targets use 1, so they
            are the rewards themselves.
        advantage_clip: bound of the result.
        target_clip: bound of the standardised value targets.
        combination: "sum_normalized" or "sum".
    """
    rewards = to_device(normalizer.head_rewards(stack_rewards(rollout)), rollout.latents.device)
    steps = to_device(torch.tensor(rollout.trained_steps), rewards.device)
    values = rollout.values[steps].transpose(0, 1).to(rewards).contiguous()
    result = ops.normalized_advantages(
        rewards,
        values,
        to_like(normalizer.mean, rewards),
        to_like(normalizer.std, rewards),
        to_like(weights, rewards),
        combination=combination,
        gae_lambda=to_like(gae_lambda, values)[steps] if isinstance(gae_lambda, Tensor) else gae_lambda,
        advantage_clip=advantage_clip,
        target_clip=target_clip,
    )
    return Advantages(steps, result.advantages.T, result.targets[:, -1], result.raw.transpose(0, 1))


@singledispatch
def with_baseline(estimator: CriticValues, rollout: Rollout) -> Rollout:
    """The rollout whose values are the baseline: as it is, with the critic's.

    `with_baseline.register` on a subclass of CriticValues, which AdvantageConfig.estimator then takes, puts
    other values (T, B, M) in their place. The critic still learns the rewards.
    """
    return rollout
