"""What a rollout knows is not computed again while it is true, and is once it is not."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny_backbones import PROMPTS, brightness, tiny_backbone, tiny_config
from torch import Tensor

from lacfast import LatentActorCriticTrainer
from lacfast.config import CriticConfig, Fixed, KLPenalty, PPOConfig, Ratio, SamplerConfig
from lacfast.learning.batches import MEASURED
from lacfast.records import Advantages, Rollout

GUIDED = SamplerConfig(num_steps=4, guidance_scale=2.5)
PPO = PPOConfig(clip=Ratio(1e-3), num_minibatches=2, microbatch_size=8, adam_eps=1e-4)
"""Minibatches of 12 pairs in two microbatches of 6."""


def trainer_for(ppo: PPOConfig = PPO, **changes: Any) -> LatentActorCriticTrainer:
    config = tiny_config(**({"ppo": ppo, "sampler": GUIDED} | changes))
    return LatentActorCriticTrainer(tiny_backbone("dit"), brightness, PROMPTS, config)


def rollout_of(trainer: LatentActorCriticTrainer, **options: Any) -> tuple[Rollout, Advantages]:
    rollout = trainer.collect(trainer.prompts, 0, **options)
    assert rollout is not None
    trainer.normalizer.update(torch.stack(list(rollout.rewards.values()), dim=1))
    return rollout, trainer.advantages(rollout)


def samples_run(trainer: LatentActorCriticTrainer, rollout: Rollout, advantages: Advantages) -> int:
    """Samples through the actor in one update."""
    count = 0

    def look(module: Any, args: Any, kwargs: Any) -> None:
        nonlocal count
        count += len(kwargs["hidden_states"] if "hidden_states" in kwargs else args[0])

    handle = trainer.backbone.model.register_forward_pre_hook(look, with_kwargs=True)
    trainer.learner.learn(rollout, advantages, 0)
    handle.remove()
    return count


def gradient_of_first_step(
    trainer: LatentActorCriticTrainer, rollout: Rollout, advantages: Advantages
) -> Tensor:
    seen: list[Tensor] = []

    def look(optimizer: Any, *_: Any) -> None:
        parameters = trainer.backbone.policy_parameters()
        seen.append(torch.cat([one.grad.flatten() for one in parameters if one.grad is not None]))

    handle = trainer.learner.policy_update.optimizer.register_step_pre_hook(look)
    trainer.learner.learn(rollout, advantages, 0)
    handle.remove()
    return seen[0]


@pytest.mark.isa
@pytest.mark.parametrize("kl", [None, KLPenalty(0.1)])
def test_the_known_half_gives_the_gradient_of_the_whole(kl: KLPenalty | None) -> None:
    ppo = replace(PPO, kl=kl)
    known, whole = trainer_for(ppo), trainer_for(ppo)
    rollout, advantages = rollout_of(known)
    first = gradient_of_first_step(known, rollout, advantages)
    expected = gradient_of_first_step(whole, replace(rollout, policy_version=None), advantages)
    assert float(expected.norm()) > 0
    assert float((first - expected).norm()) <= 1e-5 * float(expected.norm())


def test_it_is_used_in_the_first_step_on_a_rollout_and_never_after() -> None:
    trainer = trainer_for()
    rollout, advantages = rollout_of(trainer)
    # Both halves of 24 pairs, but for the unconditional of 12 pairs of which the first microbatch's 6 ran.
    assert samples_run(trainer, rollout, advantages) == 2 * 24 - 12 + min(MEASURED, 6)
    # The weights have moved: the same rollout is of an old policy now.
    assert samples_run(trainer, rollout, advantages) == 2 * 24
    fresh = trainer.rollout(trainer.prompts, 0).policy_version
    assert fresh == trainer.learner.version != rollout.policy_version


def test_it_is_not_used_where_it_has_a_gradient() -> None:
    trainer = trainer_for(replace(PPO, cfg_grad="both"))
    assert samples_run(trainer, *rollout_of(trainer)) == 2 * 24


def test_averaged_or_loaded_weights_are_not_those_that_learn(tmp_path: Any) -> None:
    trainer = trainer_for(ema_decay=0.5)
    with trainer.averaged():
        rollout = trainer.rollout(trainer.prompts, 0)
    assert rollout.policy_version != trainer.learner.version
    rollout = trainer.rollout(trainer.prompts, 0)
    assert rollout.policy_version == trainer.learner.version
    trainer.save(tmp_path / "run")
    trainer.load(tmp_path / "run")
    assert rollout.policy_version != trainer.learner.version


def test_a_forward_that_is_not_the_rollout_s_is_still_seen() -> None:
    trainer = trainer_for()
    rollout, advantages = rollout_of(trainer)
    with torch.no_grad():
        trainer.backbone.policy_parameters()[0].mul_(1.5)
    metrics = trainer.learner.learn(rollout, advantages, 0)
    assert metrics["first_max_abs_log_ratio"] > 1e-6
    assert metrics["forward_mismatch"] > 1e-4


@pytest.mark.parametrize("trunk", ["branch", "shared", "clean_net"])
def test_a_critic_without_kept_features_learns_on_the_actor_s_own_forward(trunk: str) -> None:
    critic = CriticConfig(trunk=trunk, hidden_dim=16, head_dim=8, keep_features=False)
    # One step, whose weights made the rollout: the features are those that it would have kept.
    ppo = replace(PPO, num_minibatches=1, microbatch_size=100)
    trainer = trainer_for(ppo, critic=critic)
    kept, advantages = rollout_of(trainer)
    rollout = replace(kept, features={})
    assert trainer.critic is not None
    with torch.no_grad():
        for parameter in trainer.critic.parameters():
            parameter.add_(0.01)
    before = copy.deepcopy(trainer.critic)
    policy = copy.deepcopy(trainer.backbone.model.state_dict())
    plain = copy.deepcopy(before)
    steps = advantages.steps
    features = {name: tensor[steps].flatten(0, 1) for name, tensor in kept.features.items()}
    rows = torch.arange(rollout.batch_size).repeat(len(steps))
    outputs = plain.outputs(
        features,
        rollout.latents[steps].flatten(0, 1),
        rollout.table.timesteps[steps].repeat_interleave(rollout.batch_size),
        rollout.conditioning.select(rows),
    )
    loss = plain.loss(outputs, advantages.targets[rows])
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), torch.inf)
    runs = samples_run(trainer, rollout, advantages)
    # No forward besides those of the policy.
    assert runs == 24 + MEASURED
    later = trainer.learner.learn(rollout, advantages, 0)
    assert later["value_loss"] < float(loss.detach())
    assert any(
        not torch.equal(tensor, before.state_dict()[name])
        for name, tensor in trainer.critic.state_dict().items()
    )
    # The first step's own numbers, from a trainer that starts from the same weights.
    again = trainer_for(ppo, critic=critic)
    assert again.critic is not None
    again.critic.load_state_dict(before.state_dict())
    again.backbone.model.load_state_dict(policy)
    first = again.learner.learn(rollout, advantages, 0)
    assert first["value_loss"] == pytest.approx(float(loss.detach()), rel=1e-4)
    assert first["critic_grad_norm"] == pytest.approx(float(norm), rel=1e-3)


def test_training_keeps_no_features_then_and_the_policy_learns_the_same() -> None:
    results = []
    for keep in (True, False):
        critic = CriticConfig(trunk="branch", hidden_dim=16, head_dim=8, keep_features=keep)
        trainer = trainer_for(critic=critic)
        metrics = trainer.train_iteration()
        assert trainer.last_rollout is not None
        assert bool(trainer.last_rollout.features) == keep
        results.append(metrics["policy_grad_norm"])
    assert results[0] == pytest.approx(results[1], rel=1e-4)


def test_pretraining_keeps_features_all_the_same() -> None:
    kept, dropped = (
        trainer_for(critic=CriticConfig(hidden_dim=16, head_dim=8, keep_features=keep)).pretrain_critic()
        for keep in (True, False)
    )
    assert kept.explained_variance.any()
    assert torch.equal(dropped.explained_variance, kept.explained_variance)


@pytest.mark.parametrize("trunk", ["copy", "joint"])
def test_a_switch_that_would_be_ignored_is_refused(trunk: str) -> None:
    with pytest.raises(ValueError, match=f"keep_features=False would be ignored by trunk='{trunk}'; leave"):
        CriticConfig(trunk=trunk, keep_features=False)


@pytest.mark.parametrize("size", [2, 3, 8])
def test_the_mismatch_is_that_of_the_pairs_that_were_measured(size: int) -> None:
    """Every pair is as far from the rollout, so it does not matter how many are looked at."""
    found = []
    for is_reused in (True, False):
        ppo = replace(PPO, num_minibatches=1, microbatch_size=size)
        trainer = trainer_for(ppo, sampler=replace(GUIDED, window=Fixed((0, 1))))
        rollout, advantages = rollout_of(trainer)
        moved = replace(rollout, model_outputs=rollout.model_outputs + 0.01)
        if not is_reused:
            moved = replace(moved, policy_version=None)
        found.append(trainer.learner.learn(moved, advantages, 0)["forward_mismatch"])
    assert found[0] > 1e-3
    assert found[0] == pytest.approx(found[1], rel=1e-3)
