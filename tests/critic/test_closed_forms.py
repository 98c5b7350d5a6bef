"""The critic finds values that are known in closed form; with a constant critic PPO is REINFORCE."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from linear_chain import PROMPTS, LinearChain, coordinate, linear_reward, moments, quadratic_reward
from tiny_backbones import FAMILIES, tiny_backbone
from tiny_backbones import PROMPTS as SHAPES_PROMPTS
from torch import Tensor

from lacfast import (
    CriticConfig,
    LatentActorCriticTrainer,
    PPOConfig,
    SamplerConfig,
    TrainConfig,
    ops,
    reference,
)
from lacfast.backbone import build_critic
from lacfast.config import Ratio, ValuePretrainingConfig
from lacfast.critic.values import rollout_values
from lacfast.policy import policy_output
from lacfast.prompts import PromptSet
from lacfast.records import Rollout

CRITIC = CriticConfig(hidden_dim=32, head_dim=8, num_heads=2)


def chain_trainer(**ppo: object) -> LatentActorCriticTrainer:
    settings: dict[str, object] = {
        "clip": Ratio(1e-3), "value_learning_rate": 5e-3, "target_clip": 20.0, "weight_decay": 0.0,
    }  # fmt: skip
    config = TrainConfig(
        batch_size=4096,
        sampler=SamplerConfig(num_steps=5, noise_level=0.4),
        critic=CRITIC,
        ppo=PPOConfig(**(settings | ppo)),  # type: ignore[arg-type]
        pretrain=ValuePretrainingConfig(
            iterations=8, passes=0.4, minibatch_size=512, held_out_samples=256, patience=8
        ),
    )
    return LatentActorCriticTrainer(LinearChain(), [linear_reward, quadratic_reward], list(PROMPTS), config)


def fresh_rollout(trainer: LatentActorCriticTrainer, count: int = 1024) -> Rollout:
    rollout = trainer.collect(PromptSet.create(list(PROMPTS)).cycle(count), 1 << 45)
    assert rollout is not None
    return rollout


def test_a_critic_finds_the_values_of_a_linear_gaussian_chain() -> None:
    """V = E[y_T | x_k] for a linear reward, E[y_T | x_k]^2 + Var(y_T | x_k) for a quadratic one."""
    trainer = chain_trainer()
    trainer.pretrain_critic()
    assert trainer.critic is not None
    rollout = fresh_rollout(trainer)
    gain, push, noise = moments(trainer.table)
    y = torch.stack([coordinate(latents) for latents in rollout.latents[:-1]]).double()
    shift = torch.tensor([float(prompt) for prompt in rollout.prompts])
    mean = gain[:, None] * y + push[:, None] * shift
    exact = torch.stack([mean, mean.square() + noise[:, None]], dim=-1)
    found = (
        rollout_values(trainer.critic, rollout).double() * trainer.normalizer.std + trainer.normalizer.mean
    )
    explained = reference.explained_variance(found.transpose(0, 1), exact.transpose(0, 1))
    assert explained.min() > 0.99


def raw_advantages(trainer: LatentActorCriticTrainer, rollout: Rollout) -> tuple[Tensor, Tensor, Tensor]:
    """Advantages (K, B, M), values and standardised rewards (K, B, M) of the trained steps."""
    trainer.normalizer.update(torch.stack(list(rollout.rewards.values()), dim=1))
    advantages = trainer.advantages(rollout)
    rewards = trainer.normalizer.standardize(torch.stack(list(rollout.rewards.values()), dim=1))
    values = rollout.values[advantages.steps]
    return advantages.raw, values, rewards.expand_as(values)


def with_random_values(rollout: Rollout) -> Rollout:
    return replace(
        rollout, values=torch.randn(rollout.values.shape, generator=torch.Generator().manual_seed(0))
    )


def test_lambda_one_is_the_return_minus_the_value() -> None:
    trainer = chain_trainer(gae_lambda=1.0)
    raw, values, rewards = raw_advantages(trainer, with_random_values(fresh_rollout(trainer, 16)))
    torch.testing.assert_close(raw, rewards - values, atol=1e-5, rtol=1e-4)


def test_lambda_zero_is_the_one_step_temporal_difference() -> None:
    trainer = chain_trainer(gae_lambda=0.0)
    raw, values, rewards = raw_advantages(trainer, with_random_values(fresh_rollout(trainer, 16)))
    torch.testing.assert_close(raw[:-1], values[1:] - values[:-1], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(raw[-1], rewards[-1] - values[-1], atol=1e-5, rtol=1e-4)


def test_a_gate_trusts_only_the_values_of_steps_that_pass() -> None:
    """With lambda 0 where it is passed, an advantage reaches to the next trusted value or the reward."""
    trainer = chain_trainer(gae_lambda=0.0, lambda_gate=0.5)
    rollout = with_random_values(fresh_rollout(trainer, 16))
    # The rollout's own variance, which random values make negative, must not move the average far.
    trainer.confidence.decay = 1.0
    trainer.confidence.explained_variance = torch.tensor([0.1, 0.2, 0.9, 0.3, 0.9])[:, None].repeat(1, 2)
    raw, values, rewards = raw_advantages(trainer, rollout)
    for step, expected in enumerate((values[2], values[2], rewards[2], rewards[3])):
        torch.testing.assert_close(raw[step], expected - values[step], atol=1e-5, rtol=1e-4)


def policy_gradient(trainer: LatentActorCriticTrainer, rollout: Rollout) -> Tensor:
    """Of PPO's loss over all trained pairs at the rollout's own policy."""
    advantages = trainer.advantages(rollout)
    backbone, table = trainer.backbone, rollout.table
    total = torch.zeros(())
    for position, step in enumerate(advantages.steps.tolist()):
        timestep = table.timesteps[step].expand(rollout.batch_size)
        output = backbone.predict(rollout.latents[step], timestep, rollout.conditioning)
        loss, _ = ops.ppo_loss(
            output,
            rollout.model_outputs[step],
            advantages.policy[position].contiguous(),
            table.coefficients(),
            torch.full((rollout.batch_size,), step),
            noise=rollout.noise,
            clip_range=1e-3,
        )
        total = total + loss / len(advantages.steps)
    (gradient,) = torch.autograd.grad(total, backbone.policy_parameters())
    return gradient


def reinforce_gradient(trainer: LatentActorCriticTrainer, rollout: Rollout) -> Tensor:
    """Of -mean( (R - mean(R)) / std(R) log p ) with the sum of standardised rewards as R."""
    rewards = trainer.normalizer.standardize(torch.stack(list(rollout.rewards.values()), dim=1))
    table, losses = rollout.table, []
    # Deviations are those of a sample of all pairs.
    pairs = rewards.repeat(len(table.trainable_steps), 1)
    total = (rewards / pairs.std(dim=0)).sum(dim=1)
    returns = (total - total.mean()) / total.repeat(len(table.trainable_steps)).std()
    for step in table.trainable_steps:
        timestep = table.timesteps[step].expand(rollout.batch_size)
        output = trainer.backbone.predict(rollout.latents[step], timestep, rollout.conditioning)
        steps = torch.full((rollout.batch_size,), step)
        coefficients = table.coefficients()
        log_prob = reference.step_log_prob(
            rollout.latents[step], output, rollout.latents[step + 1], coefficients, steps
        )
        losses.append(-(returns * log_prob).mean())
    (gradient,) = torch.autograd.grad(torch.stack(losses).mean(), trainer.backbone.policy_parameters())
    return gradient


@pytest.mark.parametrize("constant", [0.0, 3.0])
def test_a_constant_critic_is_reinforce_with_a_constant_baseline(constant: float) -> None:
    trainer = chain_trainer()
    rollout = fresh_rollout(trainer, 64)
    rollout = replace(rollout, values=torch.full_like(rollout.values, constant))
    trainer.normalizer.update(torch.stack(list(rollout.rewards.values()), dim=1))
    expected = reinforce_gradient(trainer, rollout)
    assert expected.abs() > 1e-4
    torch.testing.assert_close(policy_gradient(trainer, rollout), expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("trunk", ["shared", "branch"])
def test_a_detached_head_leaves_the_actor_s_gradients_bit_identical(family: str, trunk: str) -> None:
    backbone = tiny_backbone(family)
    critic = build_critic(backbone, 1, replace(CRITIC, trunk=trunk))
    assert critic is not None
    torch.nn.init.normal_(critic.head.output.weight)
    sample = torch.randn((3, *backbone.latent_shape), generator=torch.Generator().manual_seed(0))
    timestep, conditioning = torch.tensor([900.0, 500.0, 100.0]), backbone.encode_prompts(SHAPES_PROMPTS[:3])
    gradients = []
    for recorded in (None, critic):
        forward = policy_output(backbone, sample, timestep, conditioning, None, critic=recorded)
        loss = forward.output.square().mean()
        if recorded is not None:
            value = recorded.outputs(forward.features, sample, timestep, conditioning)
            loss = loss + recorded.loss(value, torch.ones(3, 1))
        gradients.append(torch.autograd.grad(loss, backbone.policy_parameters(), allow_unused=True))
    for alone, beside in zip(*gradients, strict=True):
        assert (alone is None and beside is None) or torch.equal(alone, beside)
