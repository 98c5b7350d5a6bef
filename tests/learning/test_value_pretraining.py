"""Value pretraining keeps the critic that explained most on held-out states."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from linear_chain import PROMPTS as CHAIN_PROMPTS
from linear_chain import LinearChain, linear_reward
from refusals import Refusal
from tiny_backbones import PROMPTS, SMALLEST, brightness, tiny_backbone, tiny_config

from lacfast import (
    CriticConfig,
    LatentActorCriticTrainer,
    PPOConfig,
    SamplerConfig,
    ValuePretrainingConfig,
)
from lacfast.config import Ratio
from lacfast.critic.values import rollout_values, update_statistics
from lacfast.learning import value_pretraining
from lacfast.learning.pretraining_state import PretrainingState
from lacfast.learning.value_confidence import ValueConfidence
from lacfast.prompts import PromptSet
from lacfast.records import FirstSampleId
from lacfast.tasks.models import TINY, ModelSize


def trainer(
    batch_size: int = 16, *, size: ModelSize = SMALLEST, **settings: object
) -> LatentActorCriticTrainer:
    pretrain = replace(ValuePretrainingConfig(iterations=4, held_out_samples=16), **settings)  # type: ignore[arg-type]
    config = tiny_config(
        batch_size=batch_size,
        pretrain=pretrain,
        ppo=PPOConfig(clip=Ratio(1e-3), value_learning_rate=3e-3, trunk_learning_rate=1e-3),
    )
    return LatentActorCriticTrainer(tiny_backbone("dit", size=size), brightness, PROMPTS, config)


def test_the_kept_critic_is_the_best_one_and_explains_what_is_reported() -> None:
    made = trainer(passes=4.0)
    result = made.pretrain_critic()
    assert float(result.explained_variance.mean()) == pytest.approx(max(result.history))
    held_out = made.collect(PromptSet.create(PROMPTS).cycle(16), FirstSampleId.SELECTION)
    assert held_out is not None
    assert made.critic is not None
    again = value_pretraining.held_out_variance(made.critic, held_out, made.normalizer)
    torch.testing.assert_close(again, result.explained_variance)


def test_a_critic_learns_an_easy_reward() -> None:
    """The brightness of an image is one linear functional of its latents, so late states tell it."""
    result = trainer(32, size=TINY, iterations=4, passes=4.0, held_out_samples=32).pretrain_critic()
    assert float(result.explained_variance[-1]) > 0.15


def test_it_stops_when_the_critic_gets_no_better() -> None:
    stalled = trainer(iterations=6, patience=1)
    assert stalled.learner.critic_update is not None
    for group in stalled.learner.critic_update.optimizer.param_groups:
        group["lr"] = 0.0
    assert len(stalled.pretrain_critic().history) == 2


def test_without_held_out_states_each_rollout_measures_the_critic_that_has_not_seen_it() -> None:
    made = trainer(64, size=TINY, iterations=3, passes=4.0, held_out_samples=0)
    values = []
    result = made.pretrain_critic(lambda iteration, variance: values.append(float(variance.mean())))
    assert (result.images, made.images) == (3 * 64, 3 * 64)
    assert result.history == values
    assert result.history[0] == 0, "V = 0 before anything is learned"
    assert max(result.history) > 0
    assert made.critic is not None
    rollout = made.collect(PromptSet.create(PROMPTS).cycle(64), FirstSampleId.SELECTION)
    assert rollout is not None
    learned = value_pretraining.held_out_variance(made.critic, rollout, made.normalizer)
    assert float(learned.mean()) > 0, "the last critic is kept, which no iteration has measured"


def test_without_held_out_states_it_stops_too(monkeypatch: pytest.MonkeyPatch) -> None:
    scripted = iter([0.1, 0.3, 0.2, 0.1, 0.4])
    monkeypatch.setattr(
        value_pretraining, "rollout_variance", lambda rollout, normalizer: torch.tensor([[next(scripted)]])
    )
    result = trainer(iterations=6, patience=2, held_out_samples=0).pretrain_critic()
    assert result.history == pytest.approx([0.1, 0.3, 0.2, 0.1])
    assert float(result.explained_variance) == pytest.approx(0.1), "of the last critic, not of the best"


@pytest.mark.parametrize(
    "settings",
    [{"held_out_samples": 0}, {"held_out_samples": 8, "completions": 2, "bound_states": 2}],
    ids=["prequential", "held out, with bounds"],
)
def test_it_goes_on_from_a_checkpoint_to_the_same_bits_and_asks_no_reward_twice(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    through, stopped, resumed = (trainer(8, iterations=5, kept_rollouts=2, **settings) for _ in range(3))
    lines: list[list[dict[str, Any]]] = [[], []]
    for made, found in ((through, lines[0]), (resumed, lines[1])):
        made.log.write = lambda phase, found=found, **values: found.append(values)  # type: ignore[method-assign]

    def stop(iteration: int, _: torch.Tensor) -> None:
        if iteration == 2:
            stopped.save(tmp_path / "within")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped.pretrain_critic(stop)
    scored: list[int] = []

    def counted(images: torch.Tensor, *_: Any) -> torch.Tensor:
        scored.append(len(images))
        return images.mean(dim=(1, 2, 3))

    resumed.rewards.functions["brightness"] = counted
    resumed.load(tmp_path / "within")
    assert (resumed.pretraining.iteration, resumed.pretraining.is_under_way) == (3, True)
    # Before it goes on it can be saved again.
    resumed.save(tmp_path / "again")
    resumed.load(tmp_path / "again")
    # Whoever trains on without a word of value pretraining has the rest of it first.
    resumed.train(0)
    assert resumed.pretraining.iteration == 5
    resumed.load(tmp_path / "again")
    scored.clear()
    lines[1].clear()
    expected, result = through.pretrain_critic(), resumed.pretrain_critic()
    assert scored == [8, 8]
    assert result.history == expected.history
    assert torch.equal(result.explained_variance, expected.explained_variance)
    assert (result.images, resumed.images) == (expected.images, through.images)
    assert str(lines[1]) == str(lines[0][3:])
    assert not resumed.pretraining.is_under_way
    for made in (through, resumed):
        made.train(1)
    assert through.critic is not None
    assert resumed.critic is not None
    critic, again = through.critic.state_dict(), resumed.critic.state_dict()
    assert all(torch.equal(critic[name], again[name]) for name in critic)
    assert str(through.normalizer.state_dict()) == str(resumed.normalizer.state_dict())


def test_rollouts_that_would_be_others_are_not_given_the_scores_of_the_old(tmp_path: Path) -> None:
    stopped = trainer(8)
    stopped.pretrain_critic(
        lambda *_: stopped.save(tmp_path / "within") if not (tmp_path / "within").exists() else None
    )
    other = LatentActorCriticTrainer(tiny_backbone("dit"), brightness, PROMPTS[::-1], stopped.config)
    other.load(tmp_path / "within")
    with Refusal(
        "value pretraining goes on from rollouts that are made again, and their prompts are others now",
        cause="A run that was stopped within value pretraining goes on with another file of prompts.",
        remedy="give those that the run began with until it is through",
    ).raised():
        other.pretrain_critic()


def test_rollouts_of_another_precision_are_not_given_the_scores_either() -> None:
    state = PretrainingState(is_under_way=True, rollout_precision="fp8")
    with Refusal(
        "value pretraining goes on from rollouts of rollout_precision='fp8', which are made again",
        cause="A run that was stopped within value pretraining goes on with another rollout_precision.",
        remedy="keep it until it is through",
    ).raised():
        state.require_fit(tiny_config())


def chain_trainer(**pretrain: Any) -> LatentActorCriticTrainer:
    settings = {"iterations": 4, "held_out_samples": 64, "passes": 2.0, "completions": 3, "bound_states": 16}
    config = tiny_config(
        batch_size=256,
        sampler=SamplerConfig(num_steps=4, noise_level=0.4),
        pretrain=ValuePretrainingConfig(**(settings | pretrain)),
        ppo=PPOConfig(clip=Ratio(1e-3), value_learning_rate=5e-3, gae_lambda=0.9, lambda_gate=0.3),
    )
    return LatentActorCriticTrainer(LinearChain(), linear_reward, list(CHAIN_PROMPTS), config)


def test_it_stops_when_the_score_is_reached_and_counts_every_image() -> None:
    """Floor and ceiling cost 3 steps x 16 states x 3 completions beside rollouts and the held-out one."""
    trainer = chain_trainer(stop_score=0.2)
    result = trainer.pretrain_critic()
    assert len(result.history) < 4
    assert result.bounds is not None
    assert result.bounds.overall_score(result.explained_variance) >= 0.2
    assert (result.bounds.images, result.images) == (3 * 16 * 3, 64 + 256 * len(result.history))
    assert trainer.images == result.images + result.bounds.images


def test_held_out_prompts_repeat_where_the_floor_is_measured() -> None:
    trainer = chain_trainer(held_out_samples=4, bound_states=2)
    assert trainer.pretrain_critic().bounds is not None
    measured = trainer.draws.selection().texts
    assert measured[:2] == measured[2:]
    assert len(set(measured)) == 2


def test_a_gated_run_goes_on_with_what_it_knew_of_its_critic() -> None:
    trainer = chain_trainer()
    trainer.pretrain_critic()
    trainer.train(1)
    again = ValueConfidence()
    again.load_state_dict(trainer.confidence.state_dict())
    gated = again.gated_lambda(0.9, 0.3, 4)
    assert torch.equal(gated, trainer.confidence.gated_lambda(0.9, 0.3, 4))
    assert gated.min() < 1


@pytest.mark.parametrize(
    ("settings", "refusal"),
    [
        (
            {"completions": 1},
            Refusal(
                "completions=1",
                cause="One completion, which nothing can be compared with.",
                remedy="must be at least 2 to be compared (0: no bounds)",
            ),
        ),
        (
            {"stop_score": 0.9},
            Refusal(
                "stop_score=0.9 needs floor and ceiling",
                cause="A place between bounds that nothing measures.",
                remedy="set completions, for example 4",
            ),
        ),
        (
            {"completions": 2, "held_out_samples": 0},
            Refusal(
                "completions=2 are those of held-out states",
                cause="Completions without states to complete.",
                remedy="set held_out_samples",
            ),
        ),
        (
            {"held_out_samples": -1},
            Refusal(
                "held_out_samples=-1",
                cause="Fewer than no trajectories.",
                remedy="must be >= 0",
            ),
        ),
        (
            {"completions": 2, "bound_states": 1},
            Refusal(
                "bound_states=1",
                cause="A ceiling of one state, whose variance is none.",
                remedy="must be >= 2",
            ),
        ),
    ],
)
def test_bounds_that_cannot_be_measured_are_refused(settings: dict[str, Any], refusal: Refusal) -> None:
    with refusal.raised():
        ValuePretrainingConfig(**settings)


@pytest.mark.parametrize("loss", ["bce", "hl_gauss"])
def test_other_losses_keep_raw_values_from_the_first_statistics_on(loss: str) -> None:
    """A probability has units before there are statistics; a class is anchored by the first ones."""
    made = LatentActorCriticTrainer(
        tiny_backbone("dit"),
        brightness,
        PROMPTS,
        tiny_config(
            critic=CriticConfig(hidden_dim=16, head_dim=8, num_heads=2, loss=loss),
            ppo=PPOConfig(clip=Ratio(1e-3), target_clip=math.inf),
        ),
    )
    assert made.critic is not None
    torch.nn.init.normal_(made.critic.head.output.weight, generator=torch.Generator().manual_seed(0))
    for brighter in (0.0, 0.2):
        rollout = made.collect(PromptSet.create(PROMPTS), 0)
        assert rollout is not None
        rollout = rollout.with_rewards({"brightness": (rollout.rewards["brightness"] + brighter) / 2})
        moved = update_statistics(made.critic, made.normalizer, rollout)
        torch.testing.assert_close(moved.values, rollout_values(made.critic, rollout), rtol=1e-3, atol=1e-4)
    made.train(1)


def test_a_reward_that_bce_cannot_express_changes_nothing() -> None:
    config = tiny_config(
        critic=CriticConfig(hidden_dim=16, loss="bce"), ppo=PPOConfig(clip=Ratio(1e-3), target_clip=math.inf)
    )
    made = LatentActorCriticTrainer(
        tiny_backbone("dit"), {lambda images, prompts, metadata: [3.0] * len(prompts): 1.0}, PROMPTS, config
    )
    with Refusal(
        "loss='bce' values rewards in [0, 1], got 3 to 3",
        cause="Values as probabilities of a reward that is none.",
        remedy="use loss='mse' or 'hl_gauss', or rescale the reward",
    ).raised():
        made.train(1)
    assert made.normalizer.count == 0


def test_learning_rates_fall_from_the_initial_factor_towards_their_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[float] = []
    made = trainer()
    update = made.learner.critic_update
    assert update is not None
    optimizer = update.optimizer
    own = optimizer.param_groups[0]["lr"]
    made.pretrain_critic(lambda iteration, variance: seen.append(optimizer.param_groups[0]["lr"] / own))
    assert seen == pytest.approx([3.0, 2.5, 2.0, 1.5])
    assert update.optimizer.param_groups[0]["lr"] == own


def test_the_first_rewards_do_not_move_a_new_critic_from_zero() -> None:
    """Zero means "the mean": rescaled from statistics that nobody measured, it would mean -mean / std."""
    made = trainer()
    rollout = made.collect(PromptSet.create(PROMPTS), 0)
    assert rollout is not None
    assert made.critic is not None
    assert torch.equal(update_statistics(made.critic, made.normalizer, rollout).values, rollout.values)
    assert torch.equal(made.critic.head.output.bias, torch.zeros(1))


@pytest.mark.parametrize("loss", ["mse", "bce", "hl_gauss"])
def test_a_taught_critic_says_the_same_of_a_reward_in_another_run(loss: str) -> None:
    """What it knows is of raw rewards, which the next run's first rollout must not reinterpret."""
    config = tiny_config(
        critic=CriticConfig(hidden_dim=16, head_dim=8, num_heads=2, loss=loss),
        ppo=PPOConfig(clip=Ratio(1e-3), target_clip=math.inf),
    )
    first = LatentActorCriticTrainer(tiny_backbone("dit"), brightness, PROMPTS, config)
    first.train(1)
    second = LatentActorCriticTrainer(first.backbone, brightness, PROMPTS, config)
    assert second.critic is first.critic is not None
    rollout = second.collect(PromptSet.create(PROMPTS), 0)
    assert rollout is not None
    known = rollout.values * first.normalizer.std + first.normalizer.mean
    darker = rollout.with_rewards({"brightness": rollout.rewards["brightness"] / 2})
    moved = update_statistics(second.critic, second.normalizer, darker)
    said = moved.values * second.normalizer.std + second.normalizer.mean
    torch.testing.assert_close(said, known, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(moved.values, rollout_values(second.critic, rollout), rtol=1e-3, atol=1e-4)


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
