"""Every baseline is its published formula, by hand on small numbers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from refusals import Refusal
from tiny_backbones import tiny_critic
from tiny_rollouts import made_rollout
from torch import Tensor

from lacfast.advantages import (
    AdvantageEstimator,
    PromptStatistics,
    batch_advantages,
    combined,
    group_advantages,
    with_baseline,
    zero_std_groups,
)
from lacfast.compat.flow_grpo import PerPromptStatTracker
from lacfast.config import (
    DDPO,
    GRPO,
    AdvantageConfig,
    BatchMean,
    CriticConfig,
    CriticValues,
    LeaveOneOut,
    PPOConfig,
    TrainConfig,
)
from lacfast.records import Advantages, Rollout
from lacfast.reference import gae

STEPS, BATCH = 4, 6
REWARD = torch.tensor([0.0, 1.0, 2.0, 3.0, 3.0, 3.0])
PROMPTS = ["a"] * 3 + ["b"] * 3


def estimator_for(
    advantages: AdvantageConfig, names: tuple[str, ...] = ("r",), weights: Any = None, **ppo: Any
) -> AdvantageEstimator:
    config = TrainConfig(
        batch_size=BATCH,
        samples_per_prompt=3,
        advantages=advantages,
        ppo=PPOConfig(**ppo),
        critic=tiny_critic(advantages),
    )
    given = torch.ones(len(names)) if weights is None else torch.tensor(weights)
    return AdvantageEstimator(config, names, given)


def without_critic(rewards: Tensor, advantages: AdvantageConfig, **ppo: Any) -> Advantages:
    return estimator_for(advantages, **ppo)(
        made_rollout(torch.zeros(STEPS, BATCH, 0), {"r": rewards}, PROMPTS)
    )


@pytest.mark.parametrize(
    ("std", "expected"),
    [
        # Deviation of all six: mean 2, squares 4 + 1 + 0 + 1 + 1 + 1 = 8, so sqrt(8 / 6).
        ("global", [-1 / (8 / 6) ** 0.5, 0.0, 1 / (8 / 6) ** 0.5, 0.0, 0.0, 0.0]),
        # Deviation of 0, 1, 2; of 3, 3, 3 it is 0 and so are the advantages.
        ("group", [-1 / (2 / 3) ** 0.5, 0.0, 1 / (2 / 3) ** 0.5, 0.0, 0.0, 0.0]),
        ("none", [-1.0, 0.0, 1.0, 0.0, 0.0, 0.0]),
    ],
)
def test_grpo_is_the_distance_from_the_group_in_deviations(std: str, expected: list[float]) -> None:
    result = without_critic(REWARD, AdvantageConfig(estimator=GRPO(std)))
    torch.testing.assert_close(result.policy, torch.tensor(expected).expand(3, -1), rtol=2e-4, atol=0)
    assert result.steps.tolist() == [0, 1, 2]
    assert result.targets.shape == (BATCH, 0)


@pytest.mark.parametrize("global_std", [True, False])
def test_grpo_is_flow_grpo_s_own_statistic(global_std: bool) -> None:
    rewards = torch.randn(BATCH, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    theirs = PerPromptStatTracker(global_std).update(PROMPTS, rewards.numpy())
    ours = group_advantages(rewards[:, None], samples_per_prompt=3, std="global" if global_std else "group")
    torch.testing.assert_close(ours[:, 0], torch.from_numpy(theirs))


def test_leave_one_out_compares_with_the_others() -> None:
    result = without_critic(REWARD, AdvantageConfig(estimator=LeaveOneOut(std="none")))
    # 0 against (1 + 2) / 2, 1 against (0 + 2) / 2, 2 against (0 + 1) / 2.
    torch.testing.assert_close(result.policy[0], torch.tensor([-1.5, 0.0, 1.5, 0.0, 0.0, 0.0]))


def test_batch_mean_is_the_distance_from_the_rollout_in_deviations() -> None:
    result = without_critic(REWARD, AdvantageConfig(estimator=BatchMean()))
    torch.testing.assert_close(result.policy[0], (REWARD - 2) / (8 / 6) ** 0.5)


def test_ddpo_compares_with_what_the_prompt_earned_before() -> None:
    estimator = estimator_for(AdvantageConfig(estimator=DDPO(buffer_size=4, min_count=4)))
    empty = torch.zeros(STEPS, BATCH, 0)
    first = estimator(made_rollout(empty, {"r": REWARD}, PROMPTS))
    # Three rewards per prompt are too few: the rollout is the baseline.
    torch.testing.assert_close(first.policy[0], (REWARD - 2) / (8 / 6) ** 0.5, rtol=1e-5, atol=1e-6)
    later = torch.tensor([4.0, 6.0, 8.0, 1.0, 2.0, 3.0])
    second = estimator(made_rollout(empty, {"r": later}, PROMPTS))
    kept = {"a": np.array([2.0, 4, 6, 8]), "b": np.array([3.0, 1, 2, 3])}
    expected = [
        (reward - kept[prompt].mean()) / kept[prompt].std()
        for reward, prompt in zip(later.tolist(), PROMPTS, strict=True)
    ]
    torch.testing.assert_close(
        second.policy[0].double(), torch.tensor(expected).double(), rtol=1e-5, atol=1e-6
    )


def test_a_constant_critic_is_the_batch_mean() -> None:
    """REINFORCE with a constant baseline; the two differ in the divisor, n - 1 values against n rewards."""
    estimator = estimator_for(AdvantageConfig())
    rollout = made_rollout(torch.full((STEPS, BATCH, 1), 0.3), {"r": REWARD}, PROMPTS)
    estimator.normalizer.update(REWARD[:, None])
    count = 3 * BATCH
    expected = batch_advantages(REWARD[:, None])[:, 0] * ((count - 1) / count) ** 0.5
    torch.testing.assert_close(estimator(rollout).policy, expected.expand(3, -1))


def test_the_credits_of_the_steps_telescope_to_the_whole() -> None:
    """With lambda 0 a step's credit is what the value rose by; their sum is R - V_0."""
    values = torch.randn(BATCH, STEPS, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rewards = torch.zeros_like(values)
    rewards[:, -1] = 1.0
    credit, _ = gae(rewards, values, gae_lambda=0.0, value_lambda=1.0)
    whole, returns = gae(rewards, values, gae_lambda=1.0, value_lambda=1.0)
    torch.testing.assert_close(credit.sum(dim=1), 1.0 - values[:, 0])
    torch.testing.assert_close(whole, 1.0 - values)
    torch.testing.assert_close(returns, torch.ones_like(returns))


@dataclass(frozen=True)
class TwiceTheValues(CriticValues):
    """A baseline of a user's own."""


@with_baseline.register
def _(estimator: TwiceTheValues, rollout: Rollout) -> Rollout:
    return replace(rollout, values=2 * rollout.values)


def test_a_registered_baseline_changes_the_advantages_and_not_what_the_critic_learns() -> None:
    values = torch.arange(BATCH).float().expand(STEPS, -1)[..., None].contiguous()
    estimator = estimator_for(AdvantageConfig(estimator=TwiceTheValues()))
    assert estimator.config.uses_critic
    estimator.normalizer.update(REWARD[:, None])
    result = estimator(made_rollout(values, {"r": REWARD}))
    standardized = (REWARD - 2) / (8 / 6) ** 0.5
    torch.testing.assert_close(result.raw[..., 0], standardized - 2 * values[:3, :, 0])
    torch.testing.assert_close(result.targets[:, 0], standardized)


def test_groups_without_spread_are_counted() -> None:
    result = without_critic(REWARD, AdvantageConfig(estimator=GRPO()))
    assert result.metrics == {"zero_std_groups": 1, "groups": 2}
    both = torch.stack([REWARD, torch.tensor([5.0, 5, 5, 1, 2, 5])], dim=1)
    assert zero_std_groups(both, 3) == 0


def test_advantages_stay_within_their_bound() -> None:
    result = without_critic(REWARD, AdvantageConfig(estimator=GRPO()), advantage_clip=0.5)
    assert float(result.policy.abs().max()) == 0.5


def test_the_weight_of_a_single_reward_does_not_matter() -> None:
    advantages = torch.tensor([[1.0], [-2.0]])
    assert torch.equal(combined(advantages, torch.tensor([7.0])), advantages[:, 0])
    assert torch.equal(combined(advantages, torch.tensor([0.0])), torch.zeros(2))


@pytest.mark.parametrize(
    ("settings", "refusal"),
    [
        (
            {"advantages": AdvantageConfig(estimator=GRPO()), "critic": CriticConfig(trunk="none")},
            Refusal(
                "samples_per_prompt=1 makes one",
                cause="A method that compares the samples of a prompt, with one of each.",
                remedy="set 2 or more, or estimator=DDPO()",
            ),
        ),
        (
            {"advantages": AdvantageConfig(estimator=GRPO()), "samples_per_prompt": 4},
            Refusal(
                "critic.trunk='branch' would be ignored",
                cause="A critic beside an estimator that has none.",
                remedy="use critic=CriticConfig(trunk='none')",
            ),
        ),
        (
            {"critic": CriticConfig(trunk="none")},
            Refusal(
                "advantages.estimator=critic needs a critic, and critic.trunk is 'none'",
                cause="The critic was left out, and its advantages were not.",
                remedy="choose a trunk, or advantages=AdvantageConfig(estimator=GRPO())",
            ),
        ),
    ],
)
def test_a_run_whose_settings_would_be_ignored_is_refused(settings: dict[str, Any], refusal: Refusal) -> None:
    with refusal.raised():
        TrainConfig(**settings)


@pytest.mark.parametrize(
    ("settings", "refusal"),
    [
        (
            {"estimator": "grpo"},
            Refusal(
                "estimator='grpo' must be",
                cause="A word for a choice, in Python.",
                remedy="a CriticValues or a GRPO",
            ),
        ),
        (
            {"combination": "product"},
            Refusal(
                "unknown combination 'product'",
                cause="A rule that there is not.",
                remedy="known: sum_normalized",
            ),
        ),
        (
            {"floors": (("r", 0.5),)},
            Refusal(
                "floors=(('r', 0.5),) would be ignored by combination='sum_normalized'",
                cause="A floor for a rule that has none.",
                remedy="leave it out, or use 'constrained'",
            ),
        ),
        (
            {"combination": "constrained"},
            Refusal(
                "combination='constrained' needs floors",
                cause="A rule without what it is about.",
                remedy="floors=((reward, raw mean), ...)",
            ),
        ),
        (
            {"combination": "conditional"},
            Refusal(
                "combination='conditional' needs conditions",
                cause="A rule without what it is about.",
                remedy="conditions=((easy, hard, threshold), ...)",
            ),
        ),
        (
            {"combination": "constrained", "floors": (("r", float("nan")),)},
            Refusal(
                "floors[0][1]=nan",
                cause="A floor that is no number.",
                remedy="must be finite",
            ),
        ),
        (
            {"estimator": DDPO(), "combination": "sum"},
            Refusal(
                "combination='sum' of ddpo is what 'scalarized' gives",
                cause="A sum of a critic's advantages, without a critic.",
                remedy="use that",
            ),
        ),
        (
            {"combination": "constrained", "floors": (("r", 1.0),), "multiplier_maximum": 0.0},
            Refusal(
                "multiplier_maximum=0.0",
                cause="A multiplier that can never rise.",
                remedy="must be > 0",
            ),
        ),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings: dict[str, Any], refusal: Refusal) -> None:
    with refusal.raised():
        AdvantageConfig(**settings)


def test_an_estimator_s_own_settings_are_checked() -> None:
    with Refusal(
        "unknown std 'local'",
        cause="A misspelled deviation.",
        remedy="did you mean 'global'",
    ).raised():
        GRPO(std="local")
    with Refusal(
        "min_count=16 must lie in [1, buffer_size=4]",
        cause="A prompt's baseline that would want more rewards than are kept.",
        remedy="or no prompt would ever have a baseline of its own",
    ).raised():
        DDPO(buffer_size=4)


def test_statistics_of_a_prompt_refuse_another_buffer() -> None:
    statistics = PromptStatistics(4, 2)
    statistics.update(["a", "a"], [1.0, 2.0])
    with Refusal(
        "the saved statistics have buffer_size=4, these 8",
        cause="A checkpoint of a run with another buffer.",
        remedy="use the same",
    ).raised():
        PromptStatistics(8, 2).load_state(statistics.state())
