"""The denoising loop. One step is a pure function of static buffers, so that it can be captured in a graph.

Everything that changes between steps, rollouts and schedules is read from device tensors: the step index,
the transition table, the timesteps, the seed and the sample ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lacfast import ops
from lacfast.critic import Critic
from lacfast.profiling import span
from lacfast.protocols import Backbone, Features
from lacfast.records import INITIAL_STEP, Conditioning, NoiseKey, Rollout, TrajectorySlab, TransitionTable


@dataclass(frozen=True)
class SamplerBuffers:
    """All that a denoising step reads and writes, allocated once per shape."""

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
    ) -> SamplerBuffers:
        device = noise.seed.device
        batch, steps = len(noise.sample_ids), table.num_steps
        latents = torch.empty((steps + 1, batch, *latent_shape), dtype=dtype, device=device)
        return SamplerBuffers(
            step=torch.zeros(1, dtype=torch.int64, device=device),
            sample=torch.empty_like(latents[0]),
            coefficients=table.coefficients(device),
            timesteps=table.timesteps.to(device),
            noise=noise,
            conditioning=conditioning,
            uncond_conditioning=uncond_conditioning,
            guidance_scale=torch.full((1,), guidance_scale, device=device),
            latents=latents,
            model_outputs=torch.empty_like(latents[1:]),
            log_probs=torch.empty((steps, batch), device=device),
            values=torch.empty((steps, batch, num_rewards), device=device),
            features={},
        )


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


def sample_rollout(
    backbone: Backbone,
    critic: Critic | None,
    table: TransitionTable,
    prompts: Sequence[str],
    metadata: Sequence[dict[str, Any]],
    noise: NoiseKey,
    *,
    guidance_scale: float = 1.0,
    keep_features: bool = True,
) -> Rollout:
    """Trajectories for `prompts` with all that training needs of them.

    Args:
        backbone: the policy.
        critic: values of every state are stored when it is given.
        table: the sampler.
        prompts: B prompts.
        metadata: B dicts that the rewards get.
        noise: seed and B sample ids, on the backbone's device.
        guidance_scale: above 1 the unconditional half runs too.
        keep_features: False drops what the critic's trunk read (evaluation).
    """
    if not len(prompts) == len(metadata) == len(noise.sample_ids):
        raise ValueError(
            f"got {len(prompts)} prompts, {len(metadata)} metadata and {len(noise.sample_ids)} sample ids; "
            "they must match"
        )
    conditioning = backbone.encode_prompts(prompts)
    uncond_conditioning = backbone.encode_unconditional(len(prompts)) if guidance_scale > 1 else None
    buffers = SamplerBuffers.allocate(
        table,
        backbone.latent_shape,
        noise,
        conditioning,
        uncond_conditioning=uncond_conditioning,
        guidance_scale=guidance_scale,
        num_rewards=0 if critic is None else critic.num_rewards,
    )
    begin(buffers)
    for _ in range(table.num_steps):
        with span("rollout/step"):
            denoise_step(backbone, critic, buffers)
        if not keep_features:
            buffers.features.clear()
    return Rollout(
        table=table,
        latents=buffers.latents,
        model_outputs=buffers.model_outputs,
        log_probs=buffers.log_probs,
        values=buffers.values,
        features=buffers.features,
        conditioning=conditioning,
        uncond_conditioning=uncond_conditioning,
        noise=noise,
        prompts=list(prompts),
        metadata=list(metadata),
    )
