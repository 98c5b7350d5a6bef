"""A part of a rollout, sampled and decoded without any values: what it is, and the bytes that it takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from lacfast.backbone import Backbone
from lacfast.config import SamplerConfig, TrainConfig
from lacfast.critic.critic import Critic
from lacfast.critic.values import STATES_AT_ONCE, rollout_values
from lacfast.records import Conditioning, NoiseKey, Rollout, TransitionTable
from lacfast.rewards.frames import judged_frames
from lacfast.rollout.buffers import SamplerBuffers, SamplerInputs
from lacfast.rollout.memory import trajectory_bytes
from lacfast.rollout.step import begin, denoise_step
from lacfast.runs.costs import LiveBytes, fused_attention
from lacfast.runs.shards import Shards

Result = TypeVar("Result")


class DecodedBytes(NamedTuple):
    peak: int
    images: int
    kept: int
    """What an evaluation keeps: the images, or the frames of videos that rewards of images judge."""


@dataclass(frozen=True)
class Subject:
    """What is planned for."""

    backbone: Backbone
    """Best on the meta device."""
    critic: Critic | None
    conditioning: Conditioning
    """(1, ...) of a prompt."""
    config: TrainConfig
    ranks: int = 1
    """Ranks that share a rollout."""
    shards: Shards = field(default_factory=Shards)
    """Weights that are divided over some of them."""
    overlaps: bool = True
    """A part is decoded while the next is sampled, as CUDA does."""

    @property
    def batch_size(self) -> int:
        """Trajectories of a rollout on this rank; where others sample, on the one that has most."""
        samplers = self.config.rollout_ranks
        sharing = min(samplers, self.ranks - samplers) if samplers else self.ranks
        return -(-self.config.batch_size // sharing)

    @property
    def device(self) -> torch.device:
        return next(self.backbone.model.parameters()).device

    def followed(self, body: Callable[[], Result]) -> tuple[int, Result]:
        """Bytes that `body` has at its peak beyond those before, and what it returns."""
        live = LiveBytes()
        with fused_attention(), live:
            result = body()
        return live.peak.get(self.device.type, 0), result

    def part(self, table: TransitionTable, sampler: SamplerConfig, count: int, *, features: bool) -> Rollout:
        """`count` trajectories after their first step, as a sampler leaves them."""
        device = self.device
        prompts = self._prompts(count)
        uncond = self._prompts(count) if sampler.guidance_scale > 1 else None
        noise = NoiseKey.create(0, range(count), device)
        inputs = SamplerInputs.create(table, noise, prompts, uncond, sampler.guidance_scale)
        buffers = SamplerBuffers.allocate(
            inputs,
            self.backbone.latent_shape,
            num_rewards=0 if self.critic is None or features else self.critic.num_rewards,
            model_dtype=self.backbone.dtype,
            keep_features=features,
        )
        begin(buffers)
        denoise_step(self.backbone, self.critic, buffers)
        rollout = Rollout(
            table=table,
            latents=buffers.latents,
            model_outputs=buffers.model_outputs,
            log_probs=buffers.log_probs,
            values=buffers.values,
            features=buffers.features,
            conditioning=prompts,
            uncond_conditioning=uncond,
            noise=noise,
            prompts=[""] * count,
            metadata=[{}] * count,
            forward_steps=self.config.objective.forward_steps(table.num_steps),
        )
        if self.critic is None or not features:
            return rollout
        # Chunks of steps are alike: two tell what the others take.
        with torch.no_grad():
            first = replace(rollout, table=_shortened(table, max(2 * STATES_AT_ONCE // count, 2)))
            values = rollout_values(self.critic, first)
        return replace(rollout, values=values.new_empty(table.num_steps, *values.shape[1:]))

    def decoded(self, latents: Tensor) -> DecodedBytes:
        """What clean latents (B, ...) take: images of a batch together, videos one after the other."""
        if not self.backbone.judged_frames:
            peak, images = self.followed(lambda: self.backbone.decode(latents))
            return DecodedBytes(peak, images.nbytes, images.nbytes)
        count, (peak, video, kept) = len(latents), self._video
        # Beside those that are done.
        return DecodedBytes(peak + (count * video if count > 1 else 0), count * video, count * kept)

    @cached_property
    def _video(self) -> DecodedBytes:
        """What one video takes; a decoder runs so often as there are latent frames."""
        latents = torch.empty((1, *self.backbone.latent_shape), device=self.device)
        peak, video = self.followed(lambda: self.backbone.decode(latents))
        return DecodedBytes(peak, video.nbytes, judged_frames(video, self.backbone.judged_frames).nbytes)

    def _prompts(self, count: int) -> Conditioning:
        """(count, ...) of their own."""
        return Conditioning(
            {
                name: tensor.new_empty((count, *tensor.shape[1:]), device=self.device)
                for name, tensor in self.conditioning.tensors.items()
            }
        )


@dataclass(frozen=True)
class Sampled:
    """A part of a rollout and what it takes to make it."""

    rollout: Rollout
    peak_bytes: int
    """While it is sampled and decoded."""
    kept_bytes: int
    """What an evaluation keeps: its images, or frames of its videos."""

    @staticmethod
    def of(
        subject: Subject,
        table: TransitionTable,
        sampler: SamplerConfig,
        count: int,
        *,
        features: bool,
    ) -> Sampled:
        """Arguments as `Subject.part`."""
        with torch.no_grad():
            made, rollout = subject.followed(lambda: subject.part(table, sampler, count, features=features))
            decoded = subject.decoded(rollout.clean_latents)
        held = count * trajectory_bytes(rollout)
        # One part is decoded and the images of another are scored while the next is sampled.
        peak = made + decoded.peak + decoded.images if subject.overlaps else max(made, held + decoded.peak)
        return Sampled(rollout, peak, decoded.kept)

    @property
    def trajectory_bytes(self) -> int:
        return trajectory_bytes(self.rollout)


def _shortened(table: TransitionTable, steps: int) -> TransitionTable:
    """The first steps of a table."""
    rows = slice(min(steps, table.num_steps))
    return replace(
        table,
        a=table.a[rows],
        b=table.b[rows],
        std=table.std[rows],
        timesteps=table.timesteps[rows],
        sigmas=table.sigmas[: min(steps, table.num_steps) + 1],
    )
