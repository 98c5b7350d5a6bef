"""Advantages follow their definitions, per head and combined."""

from __future__ import annotations

import pytest
import torch
from tiny_rollouts import made_rollout
from torch import Tensor

from lacfast.advantages import critic_advantages
from lacfast.records import Advantages
from lacfast.rewards.normalizer import RewardNormalizer

STEPS, BATCH = 4, 6


def critic_result(
    values: Tensor,
    rewards: dict[str, Tensor],
    weights: Tensor,
    *,
    gae_lambda: float = 1.0,
    clip: float = 10.0,
) -> Advantages:
    made = made_rollout(values, rewards)
    normalizer = RewardNormalizer.create(len(rewards))
    normalizer.update(torch.stack(list(rewards.values()), dim=1))
    return critic_advantages(
        made, normalizer, weights, gae_lambda=gae_lambda, advantage_clip=clip, target_clip=5.0
    )


REWARD = torch.tensor([0.0, 1.0, 0.5, 0.25, 0.75, 1.0])
STANDARDIZED = (REWARD - REWARD.mean()) / REWARD.std(correction=0)


def test_with_lambda_one_the_advantage_is_the_reward_minus_the_value() -> None:
    values = torch.randn(STEPS, BATCH, 1, generator=torch.Generator().manual_seed(0))
    result = critic_result(values, {"r": REWARD}, torch.ones(1))
    assert result.steps.tolist() == [0, 1, 2]
    torch.testing.assert_close(result.raw[..., 0], STANDARDIZED - values[:3, :, 0])
    torch.testing.assert_close(result.targets[:, 0], STANDARDIZED)


def test_with_lambda_zero_each_step_is_credited_with_the_rise_of_the_value() -> None:
    values = torch.randn(STEPS, BATCH, 1, generator=torch.Generator().manual_seed(0))
    result = critic_result(values, {"r": REWARD}, torch.ones(1), gae_lambda=0.0)
    torch.testing.assert_close(result.raw[:2, :, 0], (values[1:3] - values[:2])[..., 0])
    torch.testing.assert_close(result.raw[2, :, 0], STANDARDIZED - values[2, :, 0])


def test_a_constant_critic_is_reinforce_with_a_constant_baseline() -> None:
    result = critic_result(torch.full((STEPS, BATCH, 1), 0.3), {"r": REWARD}, torch.ones(1))
    expected = STANDARDIZED.expand(3, -1)
    torch.testing.assert_close(result.policy, (expected - expected.mean()) / expected.std())


def test_combined_advantages_are_normalised_and_do_not_depend_on_a_reward_s_scale() -> None:
    values = torch.zeros(STEPS, BATCH, 2)
    other = torch.tensor([3.0, 1.0, 2.0, 5.0, 0.0, 1.0])
    first = critic_result(values, {"a": REWARD, "b": other}, torch.tensor([1.0, 1.0]))
    scaled = critic_result(values, {"a": REWARD, "b": 1000 * other + 7}, torch.tensor([1.0, 1.0]))
    torch.testing.assert_close(first.policy, scaled.policy)
    assert abs(float(first.policy.mean())) < 1e-6
    torch.testing.assert_close(first.policy.std(), torch.tensor(1.0))


def test_a_weight_of_zero_silences_a_reward() -> None:
    values = torch.zeros(STEPS, BATCH, 2)
    noise = torch.randn(BATCH, generator=torch.Generator().manual_seed(0))
    both = critic_result(values, {"a": REWARD, "b": noise}, torch.tensor([1.0, 0.0]))
    alone = critic_result(values[..., :1], {"a": REWARD}, torch.ones(1))
    torch.testing.assert_close(both.policy, alone.policy)


def test_advantages_and_targets_stay_within_their_bounds() -> None:
    outlier = torch.tensor([0.0, 0.0, 0.0, 0.0, 0.0, 1e6])
    result = critic_result(torch.zeros(STEPS, BATCH, 1), {"r": outlier}, torch.ones(1), clip=0.5)
    assert float(result.policy.abs().max()) <= 0.5
    assert float(result.targets.abs().max()) <= 5.0


def test_equal_rewards_give_no_advantage() -> None:
    result = critic_result(torch.zeros(STEPS, BATCH, 1), {"r": torch.ones(BATCH)}, torch.ones(1))
    assert torch.equal(result.policy, torch.zeros_like(result.policy))


@pytest.mark.parametrize("sizes", [[7], [3, 4], [1, 1, 5]])
def test_running_statistics_are_those_of_all_samples(sizes: list[int]) -> None:
    rewards = torch.randn(7, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 3 + 5
    normalizer = RewardNormalizer.create(2)
    for part in rewards.split(sizes):
        normalizer.update(part)
    torch.testing.assert_close(normalizer.mean, rewards.mean(dim=0))
    torch.testing.assert_close(normalizer.std, rewards.std(dim=0, correction=0))
