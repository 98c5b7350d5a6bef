"""Rollouts without a model, for tests of what is made of rewards and values."""

from __future__ import annotations

import torch
from torch import Tensor

from lacfast.records import Conditioning, NoiseKey, Rollout
from lacfast.schedule import flow_sde, uniform_sigmas


def made_rollout(values: Tensor, rewards: dict[str, Tensor], prompts: list[str] | None = None) -> Rollout:
    """A rollout with values (T, B, M) whose last step is deterministic, and rewards (B,)."""
    steps, batch = values.shape[:2]
    latents = torch.zeros(steps + 1, batch, 1, 1, 1)
    return Rollout(
        table=flow_sde(uniform_sigmas(steps), 0.7, window=(0, steps - 1)),
        latents=latents,
        model_outputs=latents[1:],
        log_probs=latents[1:, :, 0, 0, 0],
        values=values,
        features={},
        conditioning=Conditioning({"x": torch.zeros(batch, 1)}),
        uncond_conditioning=None,
        noise=NoiseKey.create(0, range(batch)),
        prompts=["p"] * batch if prompts is None else prompts,
        metadata=[{}] * batch,
        rewards=rewards,
    )
