"""One denoising step, as a pure function of static buffers, so that it can be captured in a graph.

Everything that changes between steps, rollouts and schedules is read from device tensors: the step index,
the transition table, the timesteps, the guidance, the prompts, the seed and the sample ids.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lacfast import ops
from lacfast.critic import Critic
from lacfast.ops.checks import arithmetic_dtype
from lacfast.protocols import Backbone, Features
from lacfast.records import INITIAL_STEP, Conditioning, NoiseKey, TrajectorySlab, TransitionTable


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
        joined = _joined(conditioning, uncond_conditioning)
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
        self.conditioning.copy_(_joined(conditioning, uncond_conditioning))

    def written(self) -> list[Tensor]:
        """What a step writes."""
        outputs = [self.latents, self.model_outputs, self.log_probs, self.values]
        return [self.step, self.sample, self.model_input, *outputs, *self.features.values()]


def _joined(conditioning: Conditioning, uncond_conditioning: Conditioning | None) -> Conditioning:
    if uncond_conditioning is None:
        return conditioning
    return Conditioning.concatenate([conditioning, uncond_conditioning])


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
    if uncond_conditioning is not None and (cfg_grad == "both" or not torch.is_grad_enabled()):
        return _one_forward(
            *(backbone, torch.cat([sample, sample]), torch.cat([timestep, timestep])),
            _joined(conditioning, uncond_conditioning),
            halves=2,
            critic=critic,
            detach=detach,
        )
    forward = _one_forward(backbone, sample, timestep, conditioning, halves=1, critic=critic, detach=detach)
    if uncond_conditioning is None:
        return forward
    with torch.no_grad():
        return replace(forward, uncond_output=backbone.predict(sample, timestep, uncond_conditioning))


def _one_forward(
    backbone: Backbone,
    sample: Tensor,
    timestep: Tensor,
    conditioning: Conditioning,
    *,
    halves: int,
    critic: Critic | None,
    detach: bool,
) -> PolicyOutput:
    """Arguments (G B, ...); where G = `halves` is 2, those without a prompt lie behind those with one."""
    recording: AbstractContextManager[Features] = (
        nullcontext({}) if critic is None else critic.record(backbone.model, detach=detach)
    )
    with recording as features:
        output = backbone.predict(sample, timestep, conditioning)
    if halves == 1:
        return PolicyOutput(output, None, features)
    cond, uncond = output.chunk(2)
    return PolicyOutput(cond, uncond, {name: tensor[: len(cond)] for name, tensor in features.items()})


@torch.no_grad()
def denoise_step(backbone: Backbone, critic: Critic | None, buffers: SamplerBuffers) -> None:
    """One step of the whole batch: forward, guidance, transition, stores. No host synchronisation.

    With a critic it stores the features or, where they are not kept, the values.
    """
    halves, batch = buffers.model_input.shape[:2]
    buffers.model_input.copy_(buffers.sample)
    timestep = buffers.timesteps.index_select(0, buffers.step).expand(halves * batch)
    model_input = buffers.model_input.flatten(0, 1)
    forward = _one_forward(
        *(backbone, model_input, timestep, buffers.conditioning), halves=halves, critic=critic, detach=True
    )
    if buffers.keep_features:
        _store_features(buffers, forward.features)
    elif critic is not None:
        prompts = buffers.conditioning.select(slice(batch))
        values = critic(forward.features, buffers.sample, timestep[:batch], prompts)
        buffers.values.index_copy_(0, buffers.step, values.float()[None])
    # A float64 model may move float32 latents; the maths is theirs.
    dtype, uncond_output = arithmetic_dtype(buffers.sample), forward.uncond_output
    ops.gaussian_step_(
        buffers.sample,
        forward.output.to(dtype).contiguous(),
        buffers.coefficients,
        buffers.step,
        noise=buffers.noise,
        uncond_output=None if uncond_output is None else uncond_output.to(dtype).contiguous(),
        guidance_scale=None if uncond_output is None else buffers.guidance_scale,
        slab=buffers.slab,
    )
    buffers.step.add_(1)


def _store_features(buffers: SamplerBuffers, features: Features) -> None:
    for name, tensor in features.items():
        if name not in buffers.features:
            buffers.features[name] = tensor.new_empty((len(buffers.timesteps), *tensor.shape))
        buffers.features[name].index_copy_(0, buffers.step, tensor[None])
