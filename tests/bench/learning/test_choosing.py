"""The critic chooses one of a prompt's trajectories before any is scored."""

from __future__ import annotations

import pytest
import torch
from tiny_backbones import PROMPTS, brightness, tiny_backbone, tiny_config

from bench.learning.choosing import CANDIDATES, LAST_STATES, Choice, choose
from lacfast.records import Rollout
from lacfast.rollout.actor import Actor
from lacfast.rollout.memory import RolloutMemory
from lacfast.trainer import LatentActorCriticTrainer


def candidates(trainer: LatentActorCriticTrainer, actor: Actor) -> Rollout:
    """All trajectories of the first iteration, of every prompt one behind the other."""
    prompts = trainer.draws.training(0)
    repeated = prompts.take([row for row in range(len(prompts)) for _ in range(CANDIDATES)])
    parts = actor.parts(repeated, 0, trainer.tables.at(0), world=trainer.world)
    return RolloutMemory.of(parts, len(repeated))


@pytest.mark.parametrize("choice", ["best", "extremes"])
def test_a_rollout_has_of_each_prompt_the_trajectory_that_v_chooses(choice: Choice) -> None:
    backbone = tiny_backbone("dit")
    scored: list[int] = []

    def reward(images: torch.Tensor, prompts: list[str], metadata: object) -> torch.Tensor:
        scored.append(len(images))
        return brightness(images, prompts, [])

    trainer = LatentActorCriticTrainer(backbone, reward, PROMPTS, tiny_config())
    assert trainer.critic is not None
    for parameter in trainer.critic.parameters():
        torch.nn.init.normal_(
            parameter, std=0.3, generator=torch.Generator().manual_seed(len(parameter.shape))
        )
    everything = candidates(trainer, trainer.actor)
    choose(trainer, choice)
    rollout = trainer.next_rollout()
    assert rollout is not None
    count = trainer.config.batch_size
    assert scored == [count]
    assert trainer.images == count
    assert rollout.prompts == trainer.draws.training(0).texts
    scores = everything.values[-LAST_STATES:].mean(dim=0).sum(dim=-1).view(count, CANDIDATES)
    assert scores.std(dim=1).min() > 0
    best, worst = scores.argmax(dim=1), scores.argmin(dim=1)
    wanted = best if choice == "best" else torch.where(torch.arange(count) % 2 == 0, best, worst)
    rows = torch.arange(count) * CANDIDATES + wanted
    assert torch.equal(rollout.noise.sample_ids, everything.noise.sample_ids[rows])
    assert torch.equal(rollout.latents, everything.latents[:, rows])
