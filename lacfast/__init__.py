"""Latent actor-critic post-training of diffusion models, fast.

The public names are imported when they are first used: `lacfast.ops` alone needs neither diffusers nor
transformers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lacfast.backbones import PipelineSettings, load_backbone
    from lacfast.config import (
        AdvantageConfig,
        CriticConfig,
        EarlyStoppingConfig,
        LoRAConfig,
        PPOConfig,
        SamplerConfig,
        SteeringConfig,
        TrainConfig,
        ValuePretrainingConfig,
    )
    from lacfast.prompts import load_prompts
    from lacfast.steering import steer
    from lacfast.trainer import LatentActorCriticTrainer

_HOMES = {
    "AdvantageConfig": "config",
    "CriticConfig": "config",
    "EarlyStoppingConfig": "config",
    "LatentActorCriticTrainer": "trainer",
    "LoRAConfig": "config",
    "PPOConfig": "config",
    "PipelineSettings": "backbones",
    "ValuePretrainingConfig": "config",
    "SamplerConfig": "config",
    "SteeringConfig": "config",
    "TrainConfig": "config",
    "load_backbone": "backbones",
    "load_prompts": "prompts",
    "steer": "steering",
}

__all__ = [
    "AdvantageConfig",
    "CriticConfig",
    "EarlyStoppingConfig",
    "LatentActorCriticTrainer",
    "LoRAConfig",
    "PPOConfig",
    "PipelineSettings",
    "SamplerConfig",
    "SteeringConfig",
    "TrainConfig",
    "ValuePretrainingConfig",
    "load_backbone",
    "load_prompts",
    "steer",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"lacfast.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'lacfast' has no attribute {name!r}")
