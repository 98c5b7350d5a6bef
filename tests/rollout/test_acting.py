"""A stale rollout is of the weights that it says, and the ratio to them is exact."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from refusals import Refusal
from tiny_backbones import PROMPTS, brightness, tiny_backbone, tiny_config
from torch import Tensor

from lacfast import LatentActorCriticTrainer, ops
from lacfast.config import CriticConfig, LoRAConfig, PPOConfig, Ratio, SamplerConfig
from lacfast.critic.values import rollout_values
from lacfast.records import Rollout

PPO = PPOConfig(clip=Ratio(1e-3), num_minibatches=2, microbatch_size=8, policy_learning_rate=1e-3)
ITERATIONS = 4


def trainer_for(staleness: int, **changes: Any) -> LatentActorCriticTrainer:
    lora = changes.pop("lora", None)
    settings = {"ppo": PPO, "sampler": SamplerConfig(num_steps=3), "staleness": staleness} | changes
    return LatentActorCriticTrainer(
        tiny_backbone("dit", lora=lora), brightness, PROMPTS, tiny_config(**settings)
    )


def policy(trainer: LatentActorCriticTrainer) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in trainer.backbone.policy_parameters()]


def trained(trainer: LatentActorCriticTrainer) -> tuple[list[Rollout], list[list[Tensor]]]:
    """The rollouts of the iterations that are left, and the weights before each of them and at the end."""
    rollouts: list[Rollout] = []
    weights = [policy(trainer)]
    while trainer.iteration < ITERATIONS:
        trainer.train_iteration(rollouts.append)
        weights.append(policy(trainer))
    return rollouts, weights


@pytest.mark.parametrize("lora", [None, LoRAConfig(rank=2)], ids=["all weights", "lora"])
@pytest.mark.parametrize("staleness", [1, 2])
def test_a_rollout_is_of_the_policy_that_has_not_seen_the_last_updates(
    staleness: int, lora: LoRAConfig | None
) -> None:
    rollouts, weights = trained(trainer_for(staleness, lora=lora))
    actor = trainer_for(0, lora=lora)
    for iteration, rollout in enumerate(rollouts):
        acting = weights[max(iteration - staleness, 0)]
        with torch.no_grad():
            for parameter, value in zip(actor.backbone.policy_parameters(), acting, strict=True):
                parameter.copy_(value)
        actor.iteration = iteration
        expected = actor.next_rollout()
        assert expected is not None
        assert torch.equal(rollout.latents, expected.latents)
        assert torch.equal(rollout.model_outputs, expected.model_outputs)
        assert rollout.rewards["brightness"].equal(expected.rewards["brightness"])
    assert not torch.equal(weights[0][0], weights[1][0])


def test_todays_critic_values_the_states_of_a_stale_rollout() -> None:
    trainer = trainer_for(1)
    trainer.train_iteration()
    rollout = trainer.next_rollout()
    assert rollout is not None
    assert trainer.critic is not None
    assert torch.equal(rollout.values, rollout_values(trainer.critic, rollout))
    assert rollout.values.abs().max() > 0


def test_the_ratio_to_a_stale_policy_is_exact() -> None:
    trainer = trainer_for(1)
    trainer.train_iteration()
    rollout = trainer.next_rollout()
    assert rollout is not None
    table, backbone = rollout.table, trainer.backbone
    for step in table.trainable_steps:
        timestep = table.timesteps[step].expand(rollout.batch_size)
        with torch.no_grad():
            output = backbone.predict(rollout.latents[step], timestep, rollout.conditioning)
        steps = torch.full((rollout.batch_size,), step)
        found = ops.log_ratio(
            *(output, rollout.model_outputs[step], table.coefficients(), steps), noise=rollout.noise
        ).log_ratio
        # By the noise that moved the acting policy, in the dtype of nothing that was stored.
        a, b, std = (row[step] for row in (table.a, table.b, table.std))
        sample, old, new = (
            each.double() for each in (rollout.latents[step], rollout.model_outputs[step], output)
        )
        noise = ops.normal_noise(tuple(sample.shape), steps, rollout.noise).double()
        moved = a * sample + b * old + std * noise
        log_probs = [-((moved - a * sample - b * v) ** 2) / (2 * std**2) for v in (new, old)]
        expected = (log_probs[0] - log_probs[1]).flatten(1).mean(dim=1)
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-9)
        assert expected.abs().max() > 1e-6


@pytest.mark.parametrize("staleness", [0, 1, 2])
def test_a_run_that_goes_on_has_the_rollouts_of_one_that_never_stopped(
    staleness: int, tmp_path: Path
) -> None:
    rollouts, weights = trained(trainer_for(staleness))
    begun = trainer_for(staleness)
    for _ in range(2):
        begun.train_iteration()
    begun.save(tmp_path / "saved")
    resumed = trainer_for(staleness)
    resumed.load(tmp_path / "saved")
    found, found_weights = trained(resumed)
    for one, other in zip(found, rollouts[2:], strict=True):
        assert torch.equal(one.latents, other.latents)
        assert torch.equal(one.values, other.values)
    assert all(map(torch.equal, found_weights[-1], weights[-1]))


def test_a_stale_rollout_knows_of_no_weights() -> None:
    """Nothing is known of today's forward without a prompt: it runs whole."""
    guided = SamplerConfig(num_steps=2, guidance_scale=2.0)
    fresh, stale = (trainer_for(staleness, sampler=guided) for staleness in (0, 1))
    for trainer, known in ((fresh, True), (stale, False)):
        rollout = trainer.next_rollout()
        assert rollout is not None
        assert (rollout.policy_version == trainer.learner.version) is known


def test_without_staleness_no_weights_are_kept() -> None:
    trainer = trainer_for(0)
    trainer.train_iteration()
    assert trainer.source.acting.state_dict() == {"kept": {}}
    behind = trainer_for(2)
    for _ in range(3):
        behind.train_iteration()
    assert sorted(behind.source.acting.state_dict()["kept"]) == [1, 2]


def test_a_run_goes_on_with_the_staleness_that_it_had(tmp_path: Path) -> None:
    trainer = trainer_for(1)
    trainer.save(tmp_path / "saved")
    other = trainer_for(0)
    other.config = replace(other.config, seed=trainer.config.seed)
    with pytest.raises(ValueError, match=r"staleness was 1 and is 0 now.*another run"):
        other.load(tmp_path / "saved")


@pytest.mark.parametrize(
    ("settings", "refused"),
    [
        (
            {"staleness": 1, "ppo": PPOConfig(ratio="ratio_norm")},
            Refusal(
                "so it cannot correct for a policy that is staleness=1 updates behind",
                cause="GRPO-Guard's ratio beside a stale policy.",
                remedy="use ratio='innovation' or staleness=0",
            ),
        ),
        (
            {"rollout_ranks": 1, "critic": CriticConfig(keep_features=False)},
            Refusal(
                "keep_features=False has states valued while they are sampled, and rollout_ranks=1",
                cause="Ranks that sample, and a critic that learns in the policy's own steps.",
                remedy="use keep_features=True or rollout_ranks=0",
            ),
        ),
    ],
)
def test_what_a_stale_or_distant_policy_makes_wrong_is_refused(
    settings: dict[str, Any], refused: Refusal
) -> None:
    with refused.raised():
        tiny_config(**settings)
