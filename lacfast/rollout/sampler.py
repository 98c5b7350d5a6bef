"""Rollouts: the denoising loop, on captured graphs where they pay."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lacfast.backbone import Backbone
from lacfast.critic.critic import Critic
from lacfast.critic.values import rollout_values
from lacfast.ops.backend import forced_backend
from lacfast.records import NoiseKey, Rollout, TransitionTable
from lacfast.rollout.buffers import SamplerBuffers, SamplerInputs
from lacfast.rollout.memory import STACKED
from lacfast.rollout.step import begin, denoise_step
from lacfast.runtime.graph import GraphRunner, StaticStep, weights_of
from lacfast.runtime.profiling import span

KEPT_SHAPES = 8
"""Shapes whose buffers and graphs are kept; training and evaluation with their tails need four at most."""


@dataclass(frozen=True)
class _Captured:
    """Buffers that stay, and the step that runs on them."""

    buffers: SamplerBuffers
    step: StaticStep


class RolloutSampler:
    """Samples trajectories, one batch after the other.

    Without graphs a rollout takes over the buffers that it was sampled in. With graphs the buffers of a shape
    stay, and a rollout is a copy of them: weights, prompts, noise, guidance scale and schedule are values at
    addresses that stay, so none needs another capture. A new shape, dtype, adapter or backend needs one.
    """

    def __init__(self, backbone: Backbone, critic: Critic | None, runner: GraphRunner) -> None:
        """
        Args:
            backbone: the policy.
            critic: values every state when it is given: of a rollout that keeps features after its last step,
                else within each step.
            runner: captures the steps, or runs them eagerly.
        """
        self.backbone = backbone
        self.critic = critic
        self.runner = runner
        self._captured: OrderedDict[Hashable, _Captured] = OrderedDict()
        self._eager: set[Hashable] = set()

    def sample(
        self,
        table: TransitionTable,
        prompts: Sequence[str],
        metadata: Sequence[dict[str, Any]],
        noise: NoiseKey,
        *,
        guidance_scale: float = 1.0,
        keep_features: bool = True,
        valued: bool = True,
        batch_size: int = 0,
    ) -> Rollout:
        """Trajectories for `prompts` with all that training needs of them.

        Args:
            table: the sampler.
            prompts: B prompts.
            metadata: B dicts that the rewards get.
            noise: seed and B sample ids, on the backbone's device.
            guidance_scale: above 1 the unconditional half runs too.
            keep_features: False drops what the critic's trunk read (evaluation).
            valued: False leaves the values of a rollout that keeps features to who learns from it, (T, B, 0).
            batch_size: trajectories of a full batch. A smaller one, the tail, is padded to it where the step
                is captured, and the padding is cut off. 0: no other batches.

        Raises:
            ValueError: for counts that do not match, or a parameter that was replaced since the capture.
        """
        if not len(prompts) == len(metadata) == len(noise.sample_ids):
            raise ValueError(
                f"got {len(prompts)} prompts, {len(metadata)} metadata and {len(noise.sample_ids)} sample "
                "ids; they must match"
            )
        conditioning = self.backbone.encode_prompts(prompts)
        uncond = self.backbone.encode_unconditional(len(prompts)) if guidance_scale > 1 else None
        inputs = SamplerInputs.create(table, noise, conditioning, uncond, guidance_scale)
        rollout = Rollout(
            table=table,
            conditioning=conditioning,
            uncond_conditioning=uncond,
            noise=noise,
            prompts=list(prompts),
            metadata=list(metadata),
            **self._trajectories(inputs, max(batch_size, len(prompts)), keep_features),
        )
        if self.critic is None or not keep_features or not valued:
            return rollout
        with span("rollout/values"):
            return replace(rollout, values=rollout_values(self.critic, rollout))

    def close(self) -> None:
        """Free the buffers and graphs of all shapes."""
        while self._captured:
            self._release(next(iter(self._captured)))

    def _trajectories(self, inputs: SamplerInputs, batch_size: int, keep_features: bool) -> dict[str, Any]:
        num_steps = len(inputs.timesteps)
        padded = inputs.padded(batch_size) if self.runner.captures else None
        key = None if padded is None else self._key(padded, keep_features)
        if padded is None or key in self._eager:
            buffers = self._allocate(inputs, keep_features)
            begin(buffers)
            for _ in range(num_steps):
                with span("rollout/step"):
                    denoise_step(self.backbone, self.critic, buffers)
            return _stored(buffers)
        captured = self._captured_for(key, padded, keep_features)
        self.runner.check_addresses(captured.step)
        begin(captured.buffers)
        try:
            with span("rollout/step"):
                self.runner.run(captured.step, num_steps)
            copies = _first(captured.buffers, inputs.batch_size, num_steps)
        except torch.OutOfMemoryError:
            # Nobody will ask for this shape again.
            self._release(key)
            raise
        if self.runner.is_eager(captured.step):
            self._release(key)
            self._eager.add(key)
        return copies

    def _captured_for(self, key: Hashable, inputs: SamplerInputs, keep_features: bool) -> _Captured:
        """The buffers of a shape, with these inputs in them."""
        found = self._captured.get(key)
        if found is not None and len(found.buffers.inputs.timesteps) >= len(inputs.timesteps):
            self._captured.move_to_end(key)
            own = found.buffers.inputs
            own.copy_(inputs.with_room(len(own.timesteps)))
            return found
        if found is not None:
            self._release(key)
        elif len(self._captured) == KEPT_SHAPES:
            self._release(next(iter(self._captured)))
        buffers = self._allocate(inputs.clone(), keep_features)
        step = StaticStep(
            name=f"the denoising step of {tuple(buffers.sample.shape)}",
            run=lambda: denoise_step(self.backbone, self.critic, buffers),
            written=buffers.written,
            read=self._weights,
        )
        self._captured[key] = _Captured(buffers, step)
        return self._captured[key]

    def _allocate(self, inputs: SamplerInputs, keep_features: bool) -> SamplerBuffers:
        return SamplerBuffers.allocate(
            inputs,
            self.backbone.latent_shape,
            num_rewards=0 if self.critic is None or keep_features else self.critic.num_rewards,
            model_dtype=self.backbone.dtype,
            keep_features=keep_features,
        )

    def _release(self, key: Hashable) -> None:
        self.runner.release(self._captured.pop(key).step)

    def _key(self, inputs: SamplerInputs, keep_features: bool) -> Hashable:
        """All that a graph freezes besides the values in its tensors, and the length of the schedule."""
        return (
            inputs.noise.layout,
            inputs.conditioning.layout,
            self.backbone.latent_shape,
            keep_features,
            self.backbone.forward_signature(),
            forced_backend(),
        )

    def _weights(self) -> dict[str, Tensor]:
        critic = {} if self.critic is None else {"critic": self.critic}
        return weights_of({"model": self.backbone.model, **critic})


def _stored(buffers: SamplerBuffers) -> dict[str, Any]:
    """What a step stored, by the names of a Rollout."""
    return {name: getattr(buffers, name) for name in (*STACKED, "features")}


def _first(buffers: SamplerBuffers, count: int, num_steps: int) -> dict[str, Any]:
    """Copies of the first trajectories and steps, for the next batch overwrites the buffers."""

    def copy(tensor: Tensor, steps: int = num_steps) -> Tensor:
        return tensor[:steps, :count].clone(memory_format=torch.contiguous_format)

    stacked = {name: copy(getattr(buffers, name)) for name in STACKED if name != "latents"}
    features = {name: copy(tensor) for name, tensor in buffers.features.items()}
    return {"latents": copy(buffers.latents, num_steps + 1), **stacked, "features": features}
