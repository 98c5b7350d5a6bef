"""The critic's memory of rollouts: what is drawn, in which units, and that a run resumes with it."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from refusals import Refusal
from tiny_backbones import PROMPTS, brightness, tiny_backbone, tiny_config
from torch import Tensor

from lacfast import CriticConfig, LatentActorCriticTrainer, PPOConfig
from lacfast.config import TrainConfig
from lacfast.critic.values import value_targets
from lacfast.distributed import Share
from lacfast.learning.batches import CriticSource
from lacfast.learning.pairs import Pairs
from lacfast.learning.replay import Experience, ValueReplay
from lacfast.rewards.heads import stack_rewards
from lacfast.rollout import memory


def trainer_for(rollouts: int, minibatches: int = 0) -> LatentActorCriticTrainer:
    config = tiny_config()
    ppo = replace(config.ppo, critic_rollouts=rollouts, critic_minibatches=minibatches)
    return LatentActorCriticTrainer(tiny_backbone("dit"), brightness, PROMPTS, replace(config, ppo=ppo))


def experiences(count: int) -> list[Experience]:
    trainer, found = trainer_for(1), []
    for iteration in range(count):
        rollout = trainer.collect(trainer.prompts, 100 * iteration)
        assert rollout is not None
        assert trainer.critic is not None
        targets = torch.full((rollout.batch_size, 1), float(iteration))
        found.append(Experience.of(rollout, targets, trainer.critic))
    return found


def drawn(replay: ValueReplay, today: Experience, count: int) -> Counter[tuple[float, int, int]]:
    """How often each state was drawn: (target of its rollout, step, row)."""
    generator = torch.Generator().manual_seed(0)
    return Counter(
        (float(experience.targets[0]), int(step), int(row))
        for experience, pairs in replay.minibatches(today, count, generator)
        for step, row in zip(pairs.steps, pairs.rows, strict=True)
    )


def test_alone_a_rollout_is_seen_once_and_whole() -> None:
    (today,) = experiences(1)
    seen = drawn(ValueReplay(1), today, 3)
    assert len(seen) == today.num_steps * today.batch_size
    assert set(seen.values()) == {1}


def test_a_share_of_a_checkpoint_does_not_keep_the_rows_of_others() -> None:
    (whole,) = experiences(1)
    part = whole.of_share(Share(0, 1, whole.batch_size))
    kept = [part.latents, *part.features.values(), *part.conditioning.tensors.values(), part.targets]
    assert [tensor.untyped_storage().nbytes() for tensor in kept] == [tensor.nbytes for tensor in kept]
    torch.testing.assert_close(part.latents, whole.latents[:, :1])


def test_a_pass_draws_from_the_last_rollouts_and_forgets_older_ones() -> None:
    first, second, third, today = experiences(4)
    replay = ValueReplay(3)
    for experience in (first, second, third):
        replay.add(experience)
    seen = drawn(replay, today, 24)
    assert {rollout for rollout, _, _ in seen} == {1.0, 2.0, 3.0}
    assert sum(seen.values()) == today.num_steps * today.batch_size
    assert set(seen.values()) == {1}


@pytest.mark.parametrize("count", [5, 17, 29, 32])
def test_any_number_of_minibatches_makes_up_a_rollout(count: int) -> None:
    first, today = experiences(2)
    replay = ValueReplay(2)
    replay.add(first)
    generator = torch.Generator().manual_seed(0)
    sizes = [len(pairs) for _, pairs in replay.minibatches(today, count, generator)]
    assert len(sizes) == count
    assert max(sizes) - min(sizes) <= 1
    assert sum(sizes) == today.num_steps * today.batch_size


def test_more_minibatches_than_states_are_refused() -> None:
    (today,) = experiences(1)
    with Refusal(
        "32 of 32 (sample, step) pairs make no 33 minibatches",
        cause="More optimizer steps per pass than a rollout has states.",
        remedy="lower num_minibatches (critic_minibatches), or raise batch_size or timestep_fraction",
    ).raised():
        drawn(ValueReplay(1), today, 33)


def test_old_targets_follow_the_units_of_today() -> None:
    trainer = trainer_for(2)
    assert trainer.critic is not None
    rollout = trainer.collect(trainer.prompts, 0)
    assert rollout is not None
    experience: Experience | None = None
    for other in (0.0, 0.01):
        # A second rollout with other rewards moves mean and deviation.
        rewards = {name: values + other for name, values in rollout.rewards.items()}
        trainer.normalizer.update(torch.stack(list(rewards.values()), dim=1))
        trainer.critic.reward_mean.copy_(trainer.normalizer.mean)
        trainer.critic.reward_std.copy_(trainer.normalizer.std)
        targets = value_targets(stack_rewards(rollout), trainer.normalizer, 100.0)
        experience = experience or Experience.of(rollout, targets, trainer.critic)
        torch.testing.assert_close(experience.targets_for(trainer.critic), targets, rtol=1e-5, atol=1e-5)
    assert experience is not None
    assert (experience.targets - targets).abs().min() > 0.1


def test_the_critic_learns_from_the_rollout_before_todays_too(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = trainer_for(2, minibatches=16)
    learned: list[int] = []
    update = trainer.learner.critic_update
    assert update is not None
    step = update.step

    def spied(source: CriticSource, minibatch: Pairs) -> Tensor:
        learned.append(source.states.latents.data_ptr())
        return step(source, minibatch)

    monkeypatch.setattr(update, "step", spied)
    rollouts = []
    for _ in range(3):
        learned.clear()
        trainer.train_iteration()
        assert trainer.last_rollout is not None
        rollouts.append(trainer.last_rollout.latents.data_ptr())
    assert len(learned) == 16
    assert set(learned) == set(rollouts[1:])


def test_the_host_is_asked_for_room_before_anything_is_learned(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = trainer_for(3)
    assert trainer.critic is not None
    before = [parameter.detach().clone() for parameter in trainer.critic.parameters()]
    with monkeypatch.context() as patched:
        patched.setattr(memory, "free_host_bytes", lambda: 1000)
        with Refusal(
            "16 trajectories of",
            cause="More rollouts for the critic to draw from than the host's memory holds.",
            remedy="lower ppo.critic_rollouts=3",
        ).raised():
            trainer.train_iteration()
    assert all(map(torch.equal, before, trainer.critic.parameters()))


def test_a_run_with_a_replay_goes_on_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    whole, stopped, later = (trainer_for(3, minibatches=6) for _ in range(3))
    whole.train(4)
    stopped.train(2)
    stopped.save(tmp_path / "run")
    later.load(tmp_path / "run")
    later.train(2)
    assert whole.critic is not None
    assert later.critic is not None
    for one, other in zip(whole.critic.parameters(), later.critic.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("critic", "refusal"),
    [
        (
            CriticConfig(keep_features=False),
            Refusal(
                "ppo.critic_rollouts=2 would be ignored: with keep_features=False",
                cause="Older rollouts for a critic that learns in the policy's steps.",
                remedy="use keep_features=True",
            ),
        ),
        (
            CriticConfig(value_clip=0.2),
            Refusal(
                "value_clip=0.2 bounds a value's move from that of its own rollout, and critic_rollouts=2",
                cause="PPO's value clip on older rollouts, whose values are not today's.",
                remedy="use value_clip=math.inf",
            ),
        ),
    ],
)
def test_settings_that_do_not_fit_a_replay_are_refused(critic: CriticConfig, refusal: Refusal) -> None:
    with refusal.raised():
        TrainConfig(critic=critic, ppo=PPOConfig(critic_rollouts=2))
