"""The static memory of a batch of trajectories: all that a denoising step reads and writes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lacfast.critic.trunk import Features
from lacfast.policy import joined_conditioning
from lacfast.records import Conditioning, NoiseKey, TrajectorySlab, TransitionTable


@dataclass(frozen=True)
class SamplerBuffers:
    """All that a denoising step reads and writes, with room for T steps; fewer take the first rows."""

    step: Tensor
    """(1,) int64, advanced by the step itself."""
    sample: Tensor
    """(B, C, H, W) current latents."""
    model_input: Tensor
    """(G, B, C, H, W) the same in the model's dtype; G = 2 with guidance, else 1."""
    coefficients: Tensor
    """(T, 3) float32"""
    timesteps: Tensor
    """(T,) float32"""
    noise: NoiseKey
    conditioning: Conditioning
    """(G B, ...) the prompts', behind them what stands in their place where there is guidance."""
    guidance_scale: Tensor
    """(1,) float32, read with guidance."""
    latents: Tensor
    """(T + 1, B, C, H, W)"""
    model_outputs: Tensor
    """(T, B, C, H, W)"""
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
        table: TransitionTable,
        latent_shape: tuple[int, ...],
        noise: NoiseKey,
        conditioning: Conditioning,
        *,
        uncond_conditioning: Conditioning | None = None,
        guidance_scale: float = 1.0,
        num_rewards: int = 0,
        dtype: torch.dtype = torch.float32,
        model_dtype: torch.dtype = torch.float32,
        keep_features: bool = True,
        max_steps: int = 0,
    ) -> SamplerBuffers:
        """Memory for a batch.

        Args:
            table: the sampler.
            latent_shape: (C, H, W) or (L, D).
            noise: seed and B sample ids, not copied.
            conditioning: (B, ...)
            uncond_conditioning: (B, ...) with guidance.
            guidance_scale: used with `uncond_conditioning`.
            num_rewards: M, heads of the critic that values every step; 0 without one.
            dtype: of the latents.
            model_dtype: that the model takes them in.
            keep_features: keep what the critic's trunk reads of every step, and leave its values for later.
            max_steps: room for schedules longer than `table`.
        """
        device = noise.seed.device
        batch, steps = len(noise.sample_ids), max(table.num_steps, max_steps)
        latents = torch.empty((steps + 1, batch, *latent_shape), dtype=dtype, device=device)
        joined = joined_conditioning(conditioning, uncond_conditioning)
        halves = len(joined) // batch
        return SamplerBuffers(
            step=torch.zeros(1, dtype=torch.int64, device=device),
            sample=torch.empty_like(latents[0]),
            model_input=torch.empty((halves, batch, *latent_shape), dtype=model_dtype, device=device),
            coefficients=_with_rows(table.coefficients(), steps).to(device),
            timesteps=_with_rows(table.timesteps, steps).to(device),
            noise=noise,
            conditioning=joined,
            guidance_scale=torch.full((1,), guidance_scale, device=device),
            latents=latents,
            model_outputs=torch.empty_like(latents[1:]),
            log_probs=torch.empty((steps, batch), device=device),
            values=torch.empty((steps, batch, num_rewards), device=device),
            features={},
            keep_features=keep_features,
        )

    def load(
        self,
        table: TransitionTable,
        noise: NoiseKey,
        conditioning: Conditioning,
        uncond_conditioning: Conditioning | None,
        guidance_scale: float,
    ) -> None:
        """Copy the inputs of another batch of the same shapes to where the step reads them."""
        steps = len(self.timesteps)
        self.coefficients.copy_(_with_rows(table.coefficients(), steps))
        self.timesteps.copy_(_with_rows(table.timesteps, steps))
        self.guidance_scale.fill_(guidance_scale)
        self.noise.seed.copy_(noise.seed)
        self.noise.sample_ids.copy_(noise.sample_ids)
        self.conditioning.copy_(joined_conditioning(conditioning, uncond_conditioning))

    def written(self) -> list[Tensor]:
        """What a step writes."""
        outputs = [self.latents, self.model_outputs, self.log_probs, self.values]
        return [self.step, self.sample, self.model_input, *outputs, *self.features.values()]


def _with_rows(rows: Tensor, count: int) -> Tensor:
    """The rows of a schedule, then zeros, which no step reads."""
    padded = rows.new_zeros((count, *rows.shape[1:]))
    padded[: len(rows)] = rows
    return padded
