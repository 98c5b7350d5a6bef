"""The hold keeps the steps that no ratio reaches where the anchor has them, and leaves the others alone."""

from __future__ import annotations

from dataclasses import replace
from itertools import count
from typing import Any

import pytest
import torch
from refusals import Refusal
from tiny_backbones import PROMPTS, brightness, tiny_backbone, tiny_config

from lacfast import LatentActorCriticTrainer
from lacfast.config import Fixed, Hold, PPOConfig, Ratio, SamplerConfig, TrainConfig
from lacfast.learning.batches import PolicySource
from lacfast.learning.hold import held_minibatches, held_steps
from lacfast.learning.pairs import all_pairs
from lacfast.records import Rollout

WINDOW = SamplerConfig(num_steps=4, window=Fixed((0, 2)), guidance_scale=2.0)


def trainer_with(hold: Hold | None) -> LatentActorCriticTrainer:
    ppo = PPOConfig(clip=Ratio(1e-3), num_minibatches=2, microbatch_size=8, hold=hold)
    ppo = replace(ppo, policy_learning_rate=1e-3)
    return LatentActorCriticTrainer(
        tiny_backbone("dit"), brightness, PROMPTS, tiny_config(sampler=WINDOW, ppo=ppo)
    )


@pytest.fixture(scope="module")
def learned() -> tuple[LatentActorCriticTrainer, Rollout]:
    """A trainer whose policy has left its anchor, and a rollout."""
    trainer = trainer_with(Hold(0.5))
    trainer.train(1)
    rollout = trainer.next_rollout()
    assert rollout is not None
    return trainer, rollout


def gradients(trainer: LatentActorCriticTrainer) -> list[torch.Tensor]:
    return [each.grad.clone() for each in trainer.backbone.policy_parameters() if each.grad is not None]


def test_the_gradient_is_that_of_the_squared_distance_however_it_is_divided(
    learned: tuple[LatentActorCriticTrainer, Rollout],
) -> None:
    trainer, rollout = learned
    hold, backbone = trainer.learner.hold, trainer.backbone
    assert hold is not None
    source = PolicySource(rollout, trainer.advantages(rollout), trainer.table.timesteps)
    pairs = all_pairs(held_steps(rollout), rollout.batch_size)
    assert pairs.steps.unique().tolist() == [2, 3]
    found, distances = [], []
    for limit in (len(pairs), 5):
        backbone.model.zero_grad()
        distance = torch.zeros(())
        hold.gradient(source, pairs, limit, distance)
        found.append(gradients(trainer))
        distances.append(float(distance))
    assert distances[0] == pytest.approx(distances[1], rel=1e-4)
    assert distances[0] > 0

    backbone.model.zero_grad()
    total = torch.zeros(())
    assert rollout.uncond_conditioning is not None
    for step, row in zip(pairs.steps, pairs.rows, strict=True):
        state = rollout.latents[step, row[None]], trainer.table.timesteps[step][None]
        outputs = []
        for model in (backbone, hold.anchor.backbone):
            cond = model.predict(*state, rollout.conditioning.select(row[None]))
            # Guidance's half without a prompt has no gradient, as in the ratio.
            uncond = model.predict(*state, rollout.uncond_conditioning.select(row[None])).detach()
            outputs.append(uncond + 2.0 * (cond - uncond))
        total = total + (outputs[0] - outputs[1].detach()).square().mean() / len(pairs)
    (0.5 * total).backward()  # type: ignore[no-untyped-call]
    for one, parts, plain in zip(*found, gradients(trainer), strict=True):
        torch.testing.assert_close(parts, one, rtol=1e-3, atol=1e-7)
        torch.testing.assert_close(plain, one, rtol=1e-3, atol=1e-7)


def test_held_steps_stay_nearer_to_where_they_were() -> None:
    distances = []
    for weight in (1e-9, 10.0):
        trainer = trainer_with(Hold(weight, share=1.0))
        trainer.train(1)
        rollout = trainer.next_rollout()
        assert rollout is not None
        metrics = trainer.update(rollout)
        distances.append(metrics["hold_distance"])
    assert 0 < distances[1] < 0.5 * distances[0]


def test_a_step_that_is_tried_again_holds_its_pairs_once(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for fails in (False, True):
        trainer = trainer_with(Hold(0.5, share=1.0))
        hold = trainer.learner.hold
        assert hold is not None
        output, calls = hold.anchor.output, count()

        def out_of_memory_once(
            *states: Any, fails: bool = fails, output: Any = output, calls: Any = calls
        ) -> Any:
            # The second part of a step, when the first has left its gradient.
            if next(calls) == 1 and fails:
                raise torch.OutOfMemoryError
            return output(*states)

        monkeypatch.setattr(hold.anchor, "output", out_of_memory_once)
        distance = trainer.train_iteration()["hold_distance"]
        found.append((distance, [each.detach().clone() for each in trainer.backbone.policy_parameters()]))
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-3)
    torch.testing.assert_close(found[1][1], found[0][1], rtol=0, atol=1e-5)


def test_without_a_hold_nothing_is_held_and_no_anchor_is_kept() -> None:
    trainer = trainer_with(None)
    assert trainer.learner.anchor is None
    assert "hold_distance" not in trainer.train_iteration()


def test_a_pass_holds_a_share_of_the_untrained_pairs(
    learned: tuple[LatentActorCriticTrainer, Rollout],
) -> None:
    _, rollout = learned
    ppo = PPOConfig(num_minibatches=2, hold=Hold(1.0, share=0.5))
    held = list(held_minibatches(rollout, ppo, torch.Generator().manual_seed(0)))
    assert [len(pairs) for pairs in held if pairs is not None] == [4, 4]


def test_a_hold_of_nothing_is_refused() -> None:
    hold = PPOConfig(hold=Hold(1e-2))
    with Refusal(
        "all 4 steps are trained",
        cause="A hold of untrained steps where the window has all steps.",
        remedy="narrow sampler.window, for example fixed:0..5",
    ).raised():
        TrainConfig(ppo=hold, sampler=SamplerConfig(num_steps=4, window=Fixed((0, 4))))
    with Refusal(
        "has 2 pairs for num_minibatches=4",
        cause="A hold of fewer pairs than there are optimizer steps.",
        remedy="raise share",
    ).raised():
        TrainConfig(ppo=hold, sampler=WINDOW, batch_size=4)
    with Refusal(
        "which shard=2 does not divide",
        cause="A hold where the weights are sharded.",
        remedy="use shard=1",
    ).raised():
        TrainConfig(ppo=hold, sampler=WINDOW, shard=2)
