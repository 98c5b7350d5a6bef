"""Trainers of tiny pipelines, and what training changed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from tiny_backbones import brightness
from tiny_pipelines import PROMPTS
from torch import Tensor

from lacfast import CriticConfig, LatentActorCriticTrainer, PPOConfig, SamplerConfig, TrainConfig
from lacfast.backbones.latent import LatentBackbone
from lacfast.backbones.scheduler_choice import is_flow
from lacfast.config import KLPenalty, Ratio


def config_for(
    backbone: LatentBackbone, *, trunk: str = "branch", guidance_scale: float = 1.0, **changes: Any
) -> TrainConfig:
    is_ddim = not is_flow(backbone.scheduler)
    ppo = PPOConfig(
        clip=Ratio(1e-3), num_minibatches=2, microbatch_size=8, kl=KLPenalty(0.1), policy_learning_rate=1e-3
    )
    config = TrainConfig(
        batch_size=4,
        sampler=SamplerConfig(
            kind="ddim" if is_ddim else "flow_sde",
            num_steps=3,
            noise_level=1.0 if is_ddim else 0.7,
            guidance_scale=guidance_scale,
        ),
        critic=CriticConfig(trunk=trunk, hidden_dim=16, head_dim=8, num_heads=2),
        ppo=ppo,
    )
    return replace(config, **changes)


def shrunk(config: TrainConfig) -> TrainConfig:
    """The settings of a recipe for a model of two blocks, and a CPU."""
    critic = replace(config.critic, num_blocks=1)
    return replace(config, batch_size=4, rollout_batch_size=2, eval_samples=4, critic=critic)


def trainer_of(backbone: LatentBackbone, **changes: Any) -> LatentActorCriticTrainer:
    return LatentActorCriticTrainer(backbone, brightness, PROMPTS, config_for(backbone, **changes))


def clones(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in state.items()}


def differing(before: dict[str, Tensor], after: dict[str, Tensor]) -> list[str]:
    assert before.keys() == after.keys()
    return [name for name in before if not torch.equal(before[name], after[name])]


def anchor_output(trainer: LatentActorCriticTrainer) -> Tensor:
    assert trainer.learner.anchor is not None
    generator = torch.Generator().manual_seed(5)
    sample = torch.randn((2, *trainer.backbone.latent_shape), generator=generator)
    with torch.no_grad():
        conditioning = trainer.backbone.encode_prompts(PROMPTS[:2])
        return trainer.learner.anchor.backbone.predict(sample, torch.tensor([700.0, 300.0]), conditioning)
