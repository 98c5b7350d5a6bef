"""Value pretraining keeps the critic that explained most on held-out states."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny_backbones import PROMPTS, brightness, tiny_backbone, tiny_config

from lacfast import LatentActorCriticTrainer, PPOConfig, ValuePretrainingConfig
from lacfast.prompts import PromptSet
from lacfast.trainer import SELECTION_IDS
from lacfast.value_pretraining import held_out_variance, rollout_values, update_statistics


def trainer(batch_size: int = 16, **settings: object) -> LatentActorCriticTrainer:
    pretrain = replace(ValuePretrainingConfig(iterations=4, held_out_samples=16), **settings)  # type: ignore[arg-type]
    config = tiny_config(
        batch_size=batch_size,
        pretrain=pretrain,
        ppo=PPOConfig(clip_range=1e-3, value_learning_rate=3e-3, trunk_learning_rate=1e-3),
    )
    return LatentActorCriticTrainer(tiny_backbone("dit"), brightness, PROMPTS, config)


def test_the_kept_critic_is_the_best_one_and_explains_what_is_reported() -> None:
    made = trainer(passes=4.0)
    result = made.pretrain_critic()
    assert float(result.explained_variance.mean()) == pytest.approx(max(result.history))
    held_out = made.collect(PromptSet.create(PROMPTS).cycle(16), SELECTION_IDS)
    assert held_out is not None
    assert made.critic is not None
    again = held_out_variance(made.critic, held_out, made.normalizer)
    torch.testing.assert_close(again, result.explained_variance)


def test_a_critic_learns_an_easy_reward() -> None:
    """The brightness of an image is one linear functional of its latents, so late states tell it."""
    result = trainer(64, iterations=6, passes=4.0, patience=6, held_out_samples=64).pretrain_critic()
    assert float(result.explained_variance[-1]) > 0.15


def test_it_stops_when_the_critic_gets_no_better() -> None:
    stalled = trainer(iterations=6, patience=1)
    for group in stalled.learner.critic_optimizer.param_groups:  # type: ignore[union-attr]
        group["lr"] = 0.0
    assert len(stalled.pretrain_critic().history) == 2


def test_learning_rates_fall_from_the_initial_factor_towards_their_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[float] = []
    made = trainer(initial_rate_factor=3.0)
    optimizer = made.learner.critic_optimizer
    assert optimizer is not None
    own = optimizer.param_groups[0]["lr"]
    made.pretrain_critic(lambda iteration, variance: seen.append(optimizer.param_groups[0]["lr"] / own))
    assert seen == pytest.approx([3.0, 2.5, 2.0, 1.5])
    assert made.learner.critic_optimizer is not None
    assert made.learner.critic_optimizer.param_groups[0]["lr"] == own


def test_the_first_rewards_do_not_move_a_new_critic_from_zero() -> None:
    """Zero means "the mean": rescaled from statistics that nobody measured, it would mean -mean / std."""
    made = trainer()
    rollout = made.collect(PromptSet.create(PROMPTS), 0)
    assert rollout is not None
    assert made.critic is not None
    assert torch.equal(update_statistics(made.critic, made.normalizer, rollout).values, rollout.values)
    assert torch.equal(made.critic.head.output.bias, torch.zeros(1))


def test_a_rollout_s_values_follow_the_statistics_like_the_head() -> None:
    """Values were sampled in the old units; an advantage R - V needs both in the new ones."""
    made = trainer()
    made.pretrain_critic()
    rollout = made.collect(PromptSet.create(PROMPTS), 0)
    assert rollout is not None
    assert made.critic is not None
    brighter = rollout.with_rewards({"brightness": rollout.rewards["brightness"] + 1.0})
    moved = update_statistics(made.critic, made.normalizer, brighter)
    assert not torch.allclose(moved.values, rollout.values)
    torch.testing.assert_close(moved.values, rollout_values(made.critic, rollout), rtol=1e-4, atol=1e-4)


def test_rewards_that_always_fail_leave_nothing_to_learn_from() -> None:
    made = trainer()
    made.rewards.functions["brightness"] = lambda images, prompts, metadata: [float("nan")] * len(prompts)
    with pytest.raises(ValueError, match="returned nan"):
        made.pretrain_critic()
