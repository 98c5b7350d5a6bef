"""Advantages against the critic's values, and the control that shows what those values are worth."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from lacfast import ops
from lacfast.distributed.world import all_reduce
from lacfast.records import Advantages, Rollout
from lacfast.rewards.heads import stack_rewards
from lacfast.rewards.normalizer import RewardNormalizer


def critic_advantages(
    rollout: Rollout,
    normalizer: RewardNormalizer,
    weights: Tensor,
    *,
    gamma: float,
    gae_lambda: float | Tensor,
    advantage_clip: float,
    target_clip: float,
    combination: str = "sum_normalized",
) -> Advantages:
    """Advantages from the critic's values, by `ops.normalized_advantages` over the trained steps and ranks.

    Args:
        rollout: with rewards.
        normalizer: already updated with this rollout's rewards; it knows what the H heads predict.
        weights: (H,) of the heads.
        gamma: discount.
        gae_lambda: of the policy's advantages, one or (T,) of each step's value; value targets use 1, so they
            are the rewards themselves.
        advantage_clip: bound of the result.
        target_clip: bound of the standardised value targets.
        combination: "sum_normalized" or "sum".
    """
    rewards = normalizer.head_rewards(stack_rewards(rollout))
    steps = torch.tensor(rollout.table.trainable_steps, device=rewards.device)
    values = rollout.values[steps].transpose(0, 1).to(rewards).contiguous()
    result = ops.normalized_advantages(
        rewards,
        values,
        normalizer.mean.to(rewards),
        normalizer.std.to(rewards),
        weights.to(rewards),
        combination=combination,
        gamma=gamma,
        gae_lambda=gae_lambda.to(values)[steps] if isinstance(gae_lambda, Tensor) else gae_lambda,
        advantage_clip=advantage_clip,
        target_clip=target_clip,
        all_reduce=all_reduce(),
    )
    return Advantages(steps, result.advantages.T, result.targets[:, -1], result.raw.transpose(0, 1))


def with_values_of_others(rollout: Rollout) -> Rollout:
    """The rollout with every trajectory's values replaced by those of another one, at the same steps.

    A control: these values have the right distribution and know nothing of the trajectory. Who gets whose
    depends on the rollout's noise key alone.

    Raises:
        ValueError: for a single trajectory.
    """
    count = rollout.batch_size
    if count < 2:
        raise ValueError(f"a batch of {count} has no other trajectory whose values it could take")
    key = int(rollout.noise.seed) * 1_000_003 + int(rollout.noise.sample_ids[0])
    # torch takes seeds of 64 bits.
    order = torch.randperm(count, generator=torch.Generator().manual_seed(key % 2**63))
    # Along the cycle that the permutation lists, nobody follows himself.
    giver = torch.empty_like(order)
    giver[order] = order.roll(1)
    return replace(rollout, values=rollout.values[:, giver.to(rollout.values.device)])
