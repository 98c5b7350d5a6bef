"""Several rewards become one advantage as each rule says, and the multipliers find their constraint."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from refusals import Refusal
from tiny_backbones import tiny_critic
from tiny_rollouts import made_rollout
from tolerances import assert_same_sum
from torch import Tensor

from lacfast.advantages import AdvantageEstimator, LagrangeMultipliers
from lacfast.config import GRPO, AdvantageConfig, TrainConfig
from lacfast.rewards.heads import RewardHeads
from lacfast.rewards.normalizer import RewardNormalizer

STEPS, BATCH = 3, 6
HARD = torch.tensor([0.0, 1.0, 1.0, 0.0, 0.0, 1.0])
EASY = torch.tensor([10.0, 20.0, 60.0, 40.0, 20.0, 90.0])
REWARDS = torch.stack([HARD, EASY], dim=1)


def standardized(values: Tensor, correction: int = 1) -> Tensor:
    return (values - values.mean()) / values.std(correction=correction)


def result_of(
    advantages: AdvantageConfig,
    weights: tuple[float, ...] = (1.0, 1.0),
    values: Tensor | None = None,
    rewards: dict[str, Tensor] | None = None,
) -> tuple[AdvantageEstimator, Any]:
    rewards = {"hard": HARD, "easy": EASY} if rewards is None else rewards
    config = TrainConfig(
        batch_size=BATCH,
        samples_per_prompt=3,
        advantages=advantages,
        critic=tiny_critic(advantages),
    )
    estimator = AdvantageEstimator(config, ("hard", "easy"), torch.tensor(weights))
    heads = len(estimator.head_names) if advantages.uses_critic else 0
    given = torch.zeros(STEPS, BATCH, heads) if values is None else values
    estimator.normalizer.update(torch.stack(list(rewards.values()), dim=1))
    return estimator, estimator(made_rollout(given, rewards))


def over_steps(advantage: Tensor, steps: int = STEPS - 1) -> Tensor:
    """Normalised as the op does it, over all samples and steps."""
    repeated = advantage.expand(steps, -1)
    return (repeated - repeated.mean()) / repeated.std()


def test_sum_normalized_gives_every_reward_its_own_deviation() -> None:
    # Values that vary a hundred times as much for one head do not drown the other.
    values = torch.randn(STEPS, BATCH, 2, generator=torch.Generator().manual_seed(0)) * torch.tensor(
        [1.0, 100.0]
    )
    _, result = result_of(AdvantageConfig(), (1.0, 2.0), values)
    raw = torch.stack([standardized(HARD, 0), standardized(EASY, 0)], dim=1) - values[:2]
    parts = (raw - raw.mean(dim=(0, 1))) / raw.flatten(0, 1).std(dim=0)
    expected = parts @ torch.tensor([1.0, 2.0])
    torch.testing.assert_close(
        result.policy, (expected - expected.mean()) / expected.std(), rtol=1e-4, atol=1e-5
    )


def test_sum_leaves_the_deviations_as_the_critic_left_them() -> None:
    values = torch.randn(STEPS, BATCH, 2, generator=torch.Generator().manual_seed(0)) * torch.tensor(
        [1.0, 100.0]
    )
    _, result = result_of(AdvantageConfig(combination="sum"), (1.0, 2.0), values)
    raw = torch.stack([standardized(HARD, 0), standardized(EASY, 0)], dim=1) - values[:2]
    expected = raw @ torch.tensor([1.0, 2.0])
    torch.testing.assert_close(
        result.policy, (expected - expected.mean()) / expected.std(), rtol=1e-4, atol=1e-5
    )


def test_scalarized_has_one_head_on_the_weighted_sum() -> None:
    estimator, result = result_of(AdvantageConfig(combination="scalarized"), (1.0, 0.5))
    assert estimator.head_names == ("scalarized",)
    total = HARD + 0.5 * EASY
    torch.testing.assert_close(result.targets, standardized(total, 0)[:, None])
    torch.testing.assert_close(result.policy, over_steps(total))
    torch.testing.assert_close(estimator.normalizer.std, total.double().std(correction=0)[None])


@pytest.mark.parametrize("shift", [0.0, -100.0], ids=["positive", "negative"])
def test_a_reward_that_is_gated_out_is_neither_for_nor_against_an_image(shift: float) -> None:
    """Whatever the reward's range: as a raw 0 it would be the best of one that is never positive."""
    conditional = AdvantageConfig(combination="conditional", conditions=(("easy", "hard", 0.5),))
    rewards = {"hard": HARD, "easy": EASY + shift}
    estimator, result = result_of(conditional, rewards=rewards)
    gated = HARD * standardized(EASY, 0)
    torch.testing.assert_close(estimator.normalizer.mean[1], (EASY.double() + shift).mean())
    torch.testing.assert_close(result.targets[:, 1], gated)
    torch.testing.assert_close(result.policy, over_steps(standardized(HARD) + standardized(gated)))
    # Without a critic the gated reward is compared with its group's.
    _, grouped = result_of(replace(conditional, estimator=GRPO("none")), (0.0, 1.0), rewards=rewards)
    raw = torch.where(HARD > 0, EASY + shift, (EASY + shift).mean()).view(2, 3)
    expected = (raw - raw.mean(dim=1, keepdim=True)).flatten().clamp(-10, 10)
    torch.testing.assert_close(grouped.policy[0], expected, rtol=1e-4, atol=1e-4)


def test_constrained_weights_rise_below_the_floor_and_are_the_combination_s() -> None:
    advantages = AdvantageConfig(
        combination="constrained", floors=(("hard", 1.0),), multiplier_learning_rate=0.4
    )
    estimator, result = result_of(advantages, (0.5, 1.0))
    # The mean of hard is 0.5 and its deviation 0.5: one deviation below the floor.
    torch.testing.assert_close(estimator.weights, torch.tensor([0.9, 1.0]).double())
    assert estimator.metrics() == pytest.approx({"weight/hard": 0.9, "weight/easy": 1.0})
    torch.testing.assert_close(result.policy, over_steps(0.9 * standardized(HARD) + standardized(EASY)))


@pytest.mark.parametrize("std", ["global", "group"])
def test_group_advantages_combine_per_reward_or_as_one(std: str) -> None:
    settings: dict[str, Any] = {"estimator": GRPO(std)}
    weights = (1.0, 0.5)

    def grouped(rewards: Tensor) -> Tensor:
        groups = rewards.view(2, 3)
        scale = (
            rewards.std(correction=0) if std == "global" else groups.std(dim=1, keepdim=True, correction=0)
        )
        return ((groups - groups.mean(dim=1, keepdim=True)) / (scale + 1e-4)).flatten()

    _, each = result_of(AdvantageConfig(**settings), weights)
    torch.testing.assert_close(each.policy[0], (grouped(HARD) + 0.5 * grouped(EASY)) / 1.5)
    _, one = result_of(AdvantageConfig(**settings, combination="scalarized"), weights)
    torch.testing.assert_close(one.policy[0], grouped(HARD + 0.5 * EASY))
    assert one.raw.shape == (STEPS - 1, BATCH, 1)


@pytest.mark.parametrize(
    ("advantages", "weights", "refusal"),
    [
        (
            AdvantageConfig(combination="conditional", conditions=(("easy", "harder", 0.5),)),
            (1.0, 1.0),
            Refusal(
                "there is no reward 'harder' to combine",
                cause="A rule on a reward that is not trained on, or that is misspelled.",
                remedy="trained on: hard, easy",
            ),
        ),
        (
            AdvantageConfig(combination="constrained", floors=(("softer", 0.5),)),
            (1.0, 1.0),
            Refusal(
                "there is no reward 'softer' to combine",
                cause="A floor of a reward that is not trained on, or that is misspelled.",
                remedy="trained on: hard, easy",
            ),
        ),
        (
            AdvantageConfig(
                combination="conditional", conditions=(("easy", "hard", 0.5), ("easy", "hard", 0.7))
            ),
            (1.0, 1.0),
            Refusal(
                "gate a reward twice",
                cause="Two conditions for one reward.",
                remedy="give one for each",
            ),
        ),
        (
            AdvantageConfig(combination="constrained", floors=(("hard", 0.5),)),
            (-1.0, 1.0),
            Refusal(
                "reward 'hard' has weight -1, but a multiplier is >= 0",
                cause="A floor of a reward that is minimised.",
                remedy="negate the reward and its floor",
            ),
        ),
    ],
)
def test_rules_that_the_rewards_do_not_fit_are_refused(
    advantages: AdvantageConfig, weights: tuple[float, float], refusal: Refusal
) -> None:
    with refusal.raised():
        result_of(advantages, weights)


def test_heads_gate_by_the_raw_reward_not_by_a_gated_one() -> None:
    heads = RewardHeads(("a", "b", "c"), (1.0,) * 3, "conditional", (("b", "a", 0.5), ("c", "b", 0.5)))
    assert heads(torch.tensor([[0.0, 1.0, 1.0]]), torch.zeros(3)).tolist() == [[0.0, 0.0, 1.0]]


def multipliers(learning_rate: float, maximum: float = 3.0) -> LagrangeMultipliers:
    return LagrangeMultipliers(
        weights=torch.tensor([1.0, 0.5]).double(),
        floors=torch.tensor([-math.inf, 0.4]).double(),
        learning_rate=learning_rate,
        maximum=maximum,
    )


def test_a_multiplier_grows_until_its_reward_reaches_the_floor() -> None:
    kept, one = multipliers(2.0), torch.ones(2).double()
    kept.update(torch.tensor([[5.0, 0.0], [1.0, 0.2]]), one)
    torch.testing.assert_close(kept.weights, torch.tensor([1.0, 1.1]).double())
    kept.update(torch.tensor([[5.0, 0.9]]), one)
    # What is left of 1.1 - 1, of rewards in float32.
    assert_same_sum(kept.weights, torch.tensor([1.0, 0.1]), unit=1)
    kept.update(torch.tensor([[5.0, 0.9]]), one)
    assert kept.weights.tolist() == [1.0, 0.0]
    kept.update(torch.tensor([[5.0, -100.0]]), one)
    assert kept.weights.tolist() == [1.0, 3.0]


def test_a_multiplier_does_not_depend_on_its_reward_s_unit() -> None:
    first, scaled = multipliers(0.3), multipliers(0.3)
    scaled.floors = scaled.floors * 1000
    rewards = torch.tensor([[5.0, 0.0], [1.0, 0.2]])
    first.update(rewards, torch.tensor([1.0, 0.1]).double())
    scaled.update(rewards * 1000, torch.tensor([1.0, 100.0]).double())
    torch.testing.assert_close(first.weights, scaled.weights)


def test_gradient_ascent_with_a_multiplier_ends_at_the_constrained_optimum() -> None:
    """Maximise -(x - 2)^2 where -x >= -1: x = 1, and the multiplier is the objective's slope there, 2."""
    kept = LagrangeMultipliers(
        weights=torch.tensor([1.0, 0.0]).double(),
        floors=torch.tensor([-math.inf, -1.0]).double(),
        learning_rate=0.1,
        maximum=10.0,
    )
    x = 0.0
    for _ in range(2000):
        objective, constraint = kept.weights.tolist()
        x += 0.05 * (-2 * objective * (x - 2) - constraint)
        kept.update(torch.tensor([[-((x - 2) ** 2), -x]]), torch.ones(2).double())
    assert x == pytest.approx(1.0, abs=1e-3)
    assert kept.weights[1].item() == pytest.approx(2.0, abs=1e-2)


def test_a_normalizer_goes_on_from_its_state() -> None:
    normalizer = RewardNormalizer.create(2)
    normalizer.update(REWARDS)
    again = RewardNormalizer.create(2)
    again.load_state_dict(normalizer.state_dict())
    for one in (normalizer, again):
        one.update(REWARDS * 2)
    assert torch.equal(again.mean, normalizer.mean)
    assert torch.equal(again.variance, normalizer.variance)
    assert again.count == normalizer.count == 2 * BATCH
