"""The static memory of a batch of trajectories: all that a denoising step reads and writes."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lacfast.critic.trunk import Features
from lacfast.policy import joined_conditioning
from lacfast.records import Conditioning, NoiseKey, Static, TrajectorySlab, TransitionTable, padding_rows
from lacfast.transfer import to_device


@dataclass(frozen=True)
class SamplerInputs(Static):
    """What a batch of B trajectories starts from."""

    coefficients: Tensor
    """(T, 3) float32"""
    timesteps: Tensor
    """(T,) float32"""
    noise: NoiseKey
    conditioning: Conditioning
    """(G B, ...) the prompts', behind them what stands in their place where there is guidance; G = 2 with
    guidance, else 1."""
    guidance_scale: Tensor
    """(1,) float32, read with guidance."""

    @staticmethod
    def create(
        table: TransitionTable,
        noise: NoiseKey,
        conditioning: Conditioning,
        uncond_conditioning: Conditioning | None = None,
        guidance_scale: float = 1.0,
    ) -> SamplerInputs:
        """Inputs on the device of `noise`, which is not copied.

        Args:
            table: the schedule.
            noise: seed and B sample ids.
            conditioning: (B, ...)
            uncond_conditioning: (B, ...) with guidance.
            guidance_scale: used with `uncond_conditioning`.
        """
        device = noise.seed.device
        return SamplerInputs(
            table.coefficients(device),
            to_device(table.timesteps, device),
            noise,
            joined_conditioning(conditioning, uncond_conditioning),
            torch.full((1,), guidance_scale, device=device),
        )

    @property
    def batch_size(self) -> int:
        return len(self.noise.sample_ids)

    @property
    def halves(self) -> int:
        """G"""
        return len(self.conditioning) // self.batch_size

    def padded(self, count: int) -> SamplerInputs:
        """Inputs of `count` trajectories, of which those beyond these repeat the last."""
        rows = padding_rows(self.batch_size, count, self.noise.seed.device)
        joined = torch.cat([rows + half * self.batch_size for half in range(self.halves)])
        return replace(self, noise=self.noise.select(rows), conditioning=self.conditioning.select(joined))

    def with_room(self, steps: int) -> SamplerInputs:
        """Inputs with at least `steps` rows of the schedule; those behind it are 0 and no step reads them."""
        missing = max(steps - len(self.timesteps), 0)
        return replace(
            self,
            coefficients=torch.nn.functional.pad(self.coefficients, (0, 0, 0, missing)),
            timesteps=torch.nn.functional.pad(self.timesteps, (0, missing)),
        )


@dataclass(frozen=True)
class SamplerBuffers:
    """All that a denoising step reads and writes, with room for T steps; fewer take the first rows."""

    inputs: SamplerInputs
    step: Tensor
    """(1,) int64, advanced by the step itself."""
    sample: Tensor
    """(B, ...) current latents, (B, C, H, W) of a map."""
    model_input: Tensor
    """(G, B, ...) the same in the model's dtype."""
    latents: Tensor
    """(T + 1, B, ...)"""
    model_outputs: Tensor
    """(T, B, ...)"""
    log_probs: Tensor
    """(T, B)"""
    values: Tensor
    """(T, B, M), written where features are not kept."""
    features: Features
    """name -> (T, B, ...), allocated by the first step."""
    keep_features: bool
    """Keep what the critic reads, for its values after the last step; else each step has its own valued."""

    @property
    def slab(self) -> TrajectorySlab:
        return TrajectorySlab(self.latents, self.model_outputs, self.log_probs)

    @staticmethod
    def allocate(
        inputs: SamplerInputs,
        latent_shape: tuple[int, ...],
        *,
        num_rewards: int = 0,
        model_dtype: torch.dtype = torch.float32,
        keep_features: bool = True,
    ) -> SamplerBuffers:
        """Memory for a batch.

        Args:
            inputs: of the batch, not copied.
            latent_shape: of one sample, see Backbone.
            num_rewards: M, heads of the critic that values every step; 0 without one.
            model_dtype: that the model takes the float32 latents in.
            keep_features: keep what the critic's trunk reads of every step, and leave its values for later.
        """
        device = inputs.timesteps.device
        batch, steps = inputs.batch_size, len(inputs.timesteps)
        latents = torch.empty((steps + 1, batch, *latent_shape), device=device)
        return SamplerBuffers(
            inputs=inputs,
            step=torch.zeros(1, dtype=torch.int64, device=device),
            sample=torch.empty_like(latents[0]),
            model_input=torch.empty((inputs.halves, batch, *latent_shape), dtype=model_dtype, device=device),
            latents=latents,
            model_outputs=torch.empty_like(latents[1:]),
            log_probs=torch.empty((steps, batch), device=device),
            values=torch.empty((steps, batch, num_rewards), device=device),
            features={},
            keep_features=keep_features,
        )

    def written(self) -> list[Tensor]:
        """What a step writes."""
        outputs = [self.latents, self.model_outputs, self.log_probs, self.values]
        return [self.step, self.sample, self.model_input, *outputs, *self.features.values()]
