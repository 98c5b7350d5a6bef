"""Latent actor-critic post-training of diffusion models, fast.

The public names are imported when they are first used: `lacfast.ops` alone needs neither diffusers nor
transformers.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {
    "AdvantageConfig": "config",
    "CriticConfig": "config",
    "EarlyStoppingConfig": "config",
    "LatentActorCriticTrainer": "trainer",
    "LoRAConfig": "config",
    "PPOConfig": "config",
    "PipelineSettings": "backbones",
    "SamplerConfig": "config",
    "SteeringConfig": "config",
    "TrainConfig": "config",
    "ValuePretrainingConfig": "config",
    "load_backbone": "backbones",
    "load_prompts": "prompts",
    "push_to_hub": "backbones",
    "recipe": "runs.recipes",
    "steer": "steering",
}
"""Public name -> the room that it comes from; __init__.pyi says the same to type checkers."""

__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"lacfast.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'lacfast' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
