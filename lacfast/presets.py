"""Configurations that were tuned for a task; variants by dataclasses.replace."""

from __future__ import annotations

from lacfast.config import (
    CriticConfig,
    PPOConfig,
    SamplerConfig,
    SteeringConfig,
    TrainConfig,
    ValuePretrainingConfig,
)


def shapes(backbone: str) -> TrainConfig:
    """The demo's task on a CPU, for backbone "dit" or "unet"."""
    if backbone not in ("dit", "unet"):
        raise ValueError(f"unknown backbone {backbone!r}; known: dit, unet")
    # A forward of the UNet costs about twice the DiT's, so it gets fewer images for the same time.
    batch_size, pretraining_iterations = (192, 16) if backbone == "dit" else (128, 10)
    return TrainConfig(
        batch_size=batch_size,
        # The early steps decide what is where; the late ones would learn to please the checker's edges.
        sampler=SamplerConfig(num_steps=8, noise_level=0.7, window=(0, 5)),
        critic=CriticConfig(trunk="branch", num_blocks=1),
        ppo=PPOConfig(
            clip_range=1e-3,
            policy_learning_rate=3e-4,
            value_learning_rate=1e-3,
            trunk_learning_rate=8e-4,
            gae_lambda=0.95,
            balance_steps=True,
            timestep_fraction=0.8,
        ),
        ema_decay=0.8,
        pretrain=ValuePretrainingConfig(
            iterations=pretraining_iterations, passes=0.35, patience=pretraining_iterations
        ),
    )


def shapes_steering() -> SteeringConfig:
    """Four particles pruned to one: 25 forwards per image over 8 steps."""
    return SteeringConfig(particles=4)
