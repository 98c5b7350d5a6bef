"""One denoising step, as a pure function of static buffers, so that it can be captured in a graph.

Everything that changes between steps, rollouts and schedules is read from device tensors: the step index,
the transition table, the timesteps, the guidance, the prompts, the seed and the sample ids.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from lacfast import ops
from lacfast.critic import Critic
from lacfast.protocols import Backbone, Features
from lacfast.records import INITIAL_STEP, Conditioning, NoiseKey, TrajectorySlab, TransitionTable


@dataclass(frozen=True)
class SamplerBuffers:
    """All that a denoising step reads and writes, with room for T steps; fewer take the first rows."""

    step: Tensor
    """(1,) int64, advanced by the step itself."""
    sample: Tensor
    """(B, C, H, W) current latents."""
    coefficients: Tensor
    """(T, 3) float32"""
    timesteps: Tensor
    """(T,) float32"""
    noise: NoiseKey
    conditioning: Conditioning
    uncond_conditioning: Conditioning | None
    guidance_scale: Tensor
    """(1,) float32, read when uncond_conditioning is there."""
    latents: Tensor
    """(T + 1, B, C, H, W)"""
    model_outputs: Tensor
    """(T, B, C, H, W)"""
    log_probs: Tensor
    """(T, B)"""
    values: Tensor
    """(T, B, M)"""
    features: Features
    """name -> (T, B, ...), allocated by the first step."""
    keep_features: bool
    """Whether they are kept at all."""

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
        keep_features: bool = True,
        max_steps: int = 0,
    ) -> SamplerBuffers:
        """Memory for a batch.

        Args:
            table: the sampler.
            latent_shape: (C, H, W) or (L, D).
            noise: seed and B sample ids. Like both conditionings, it is not copied.
            conditioning: (B, ...)
            uncond_conditioning: (B, ...) with guidance.
            guidance_scale: used with `uncond_conditioning`.
            num_rewards: M, heads of the critic; 0 without one.
            dtype: of the latents.
            keep_features: keep what the critic's trunk reads of every step.
            max_steps: room for schedules longer than `table`.
        """
        device = noise.seed.device
        batch, steps = len(noise.sample_ids), max(table.num_steps, max_steps)
        latents = torch.empty((steps + 1, batch, *latent_shape), dtype=dtype, device=device)
        return SamplerBuffers(
            step=torch.zeros(1, dtype=torch.int64, device=device),
            sample=torch.empty_like(latents[0]),
            coefficients=_with_rows(table.coefficients(), steps).to(device),
            timesteps=_with_rows(table.timesteps, steps).to(device),
            noise=noise,
            conditioning=conditioning,
            uncond_conditioning=uncond_conditioning,
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
        self.conditioning.copy_(conditioning)
        if self.uncond_conditioning is not None and uncond_conditioning is not None:
            self.uncond_conditioning.copy_(uncond_conditioning)

    def written(self) -> list[Tensor]:
        """What a step writes."""
        outputs = [self.latents, self.model_outputs, self.log_probs, self.values]
        return [self.step, self.sample, *outputs, *self.features.values()]


def _with_rows(rows: Tensor, count: int) -> Tensor:
    """The rows of a schedule, then zeros, which no step reads."""
    padded = rows.new_zeros((count, *rows.shape[1:]))
    padded[: len(rows)] = rows
    return padded


def begin(buffers: SamplerBuffers) -> None:
    """Draw the initial latents and set the step index to 0."""
    batch = buffers.sample.shape[0]
    steps = torch.full((batch,), INITIAL_STEP, dtype=torch.int64, device=buffers.sample.device)
    buffers.sample.copy_(ops.normal_noise(tuple(buffers.sample.shape), steps, buffers.noise))
    buffers.latents[0].copy_(buffers.sample)
    buffers.step.zero_()


@dataclass(frozen=True)
class PolicyOutput:
    """The forwards of one state, before guidance."""

    output: Tensor
    """(B, ...) with the prompt."""
    uncond_output: Tensor | None
    """(B, ...) without it, None without guidance."""
    features: Features
    """What the critic reads of the conditional forward, (B, ...) each; empty without a critic."""


def policy_output(
    backbone: Backbone,
    sample: Tensor,
    timestep: Tensor,
    conditioning: Conditioning,
    uncond_conditioning: Conditioning | None,
    *,
    cfg_grad: str = "cond",
    critic: Critic | None = None,
    detach: bool = True,
) -> PolicyOutput:
    """Conditional and, with guidance, unconditional output.

    Both halves of guidance are one forward, which launches half as much and multiplies larger matrices. Only
    where one half takes part in the backward pass and the other does not, each has its own.

    Args:
        cfg_grad: with "cond" the unconditional output has no gradient, with "both" it has.
        critic: whose features to record. They come from the conditional forward alone.
        detach: cut the features off the actor's graph.
    """
    recording: AbstractContextManager[Features] = (
        nullcontext({}) if critic is None else critic.record(backbone.model, detach=detach)
    )
    if uncond_conditioning is not None and (cfg_grad == "both" or not torch.is_grad_enabled()):
        halves = Conditioning.concatenate([conditioning, uncond_conditioning])
        with recording as features:
            both = backbone.predict(torch.cat([sample, sample]), torch.cat([timestep, timestep]), halves)
        batch = len(sample)
        return PolicyOutput(
            both[:batch], both[batch:], {name: tensor[:batch] for name, tensor in features.items()}
        )
    with recording as features:
        output = backbone.predict(sample, timestep, conditioning)
    if uncond_conditioning is None:
        return PolicyOutput(output, None, features)
    with torch.no_grad():
        return PolicyOutput(output, backbone.predict(sample, timestep, uncond_conditioning), features)


@torch.no_grad()
def denoise_step(backbone: Backbone, critic: Critic | None, buffers: SamplerBuffers) -> None:
    """One step of the whole batch: forward, guidance, transition, value, stores. No host synchronisation."""
    timestep = buffers.timesteps.index_select(0, buffers.step).expand(buffers.sample.shape[0])
    forward = policy_output(
        backbone, buffers.sample, timestep, buffers.conditioning, buffers.uncond_conditioning, critic=critic
    )
    if critic is not None:
        values = critic(forward.features, buffers.sample, timestep, buffers.conditioning)
        buffers.values.index_copy_(0, buffers.step, values.float()[None])
    if buffers.keep_features:
        _store_features(buffers, forward.features)
    uncond_output = forward.uncond_output
    ops.gaussian_step_(
        buffers.sample,
        forward.output.contiguous(),
        buffers.coefficients,
        buffers.step,
        noise=buffers.noise,
        uncond_output=None if uncond_output is None else uncond_output.contiguous(),
        guidance_scale=None if uncond_output is None else buffers.guidance_scale,
        slab=buffers.slab,
    )
    buffers.step.add_(1)


def _store_features(buffers: SamplerBuffers, features: Features) -> None:
    for name, tensor in features.items():
        if name not in buffers.features:
            buffers.features[name] = tensor.new_empty((len(buffers.timesteps), *tensor.shape))
        buffers.features[name].index_copy_(0, buffers.step, tensor[None])
