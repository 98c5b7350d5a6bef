"""Renoising: the chain of a rollout gives way to its clean latents with new noise, which no SDE has to make.

The noise is a function of (seed, sample id, step) as every other, so states depend on no batch and no rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lacfast import ops
from lacfast.backbone import Backbone
from lacfast.config import ForwardProcess
from lacfast.config.objective import Objective
from lacfast.critic.critic import Critic
from lacfast.critic.trunk import Features
from lacfast.policy import States, guided_output
from lacfast.records import NoiseKey, Rollout, TransitionTable
from lacfast.reference import noised
from lacfast.rollout.sampler import RolloutSampler
from lacfast.runtime.graph import GraphRunner
from lacfast.runtime.profiling import span
from lacfast.schedule import forward_rows
from lacfast.transfer import to_device

FIRST_STEP = 1 << 24
"""Step counter of the noise that step 0 is given anew; no sampler has so many steps."""
OldWeights = Callable[[], AbstractContextManager[None]]
"""Makes a context within which the model has the old policy's weights."""


def forward_noise(shape: tuple[int, ...], steps: Tensor, noise: NoiseKey) -> Tensor:
    """eps (B, ...) float32 that clean latents of this shape get at `steps` (B,), by their sampler's key."""
    return ops.normal_noise(shape, steps + FIRST_STEP, noise)


def acting_sampler(sampler: RolloutSampler, objective: Objective, old: OldWeights) -> RolloutSampler:
    """What makes rollouts to learn from by an objective: the sampler itself, or one that noises them anew."""
    if not isinstance(objective, ForwardProcess):
        return sampler
    return RenoisingSampler(sampler.backbone, sampler.critic, sampler.runner, objective, old)


class RenoisingSampler(RolloutSampler):
    """Samples by any table, keeps the clean latents, and makes states of them on the forward process."""

    def __init__(
        self,
        backbone: Backbone,
        critic: Critic | None,
        runner: GraphRunner,
        objective: ForwardProcess,
        old: OldWeights,
    ) -> None:
        """
        Args:
            backbone: the policy.
            critic: values the states that are made, whose outputs it needs. The chain has none.
            runner: captures the denoising steps, not what comes after them.
            objective: says which steps are trained, and who samples.
            old: applies the old policy, whose outputs the loss compares with.
        """
        super().__init__(backbone, None, runner)
        self.objective = objective
        self._values_of = critic
        self._old = old

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
        """Trajectories whose latents before the last are noised anew, arguments as RolloutSampler's, but that
        states are valued whatever `valued` says.

        With a critic, which learns at every step, trained or not, model outputs are the old policy's there,
        features are of its forward, values today's critic's. Without one outputs are NaN, until the update
        fills in those of the pairs that it draws.
        """
        samples_old = self.objective.samples_old
        with self._old() if samples_old else nullcontext():
            chain = super().sample(
                *(table, prompts, metadata, noise),
                guidance_scale=guidance_scale,
                keep_features=False,
                batch_size=batch_size,
            )
            forwards_old = self._values_of is not None and not samples_old
            with span("rollout/renoising"), self._old() if forwards_old else nullcontext():
                return self._renoised(chain, guidance_scale, keep_features=keep_features)

    @torch.no_grad()
    def _renoised(self, chain: Rollout, guidance_scale: float, *, keep_features: bool) -> Rollout:
        """The rollout whose states are made of its clean latents, in the chain's memory."""
        critic, device = self._values_of, chain.latents.device
        rows = to_device(forward_rows(chain.table), device, torch.float32)
        timesteps = to_device(chain.table.timesteps, device)
        values: list[Tensor] = []
        features: dict[str, Tensor] = {}
        for step in range(chain.num_steps):
            steps = torch.full((chain.batch_size,), step, dtype=torch.int64, device=device)
            eps = forward_noise(tuple(chain.clean_latents.shape), steps, chain.noise)
            # The state that acts is the one that is stored.
            chain.latents[step].copy_(noised(chain.clean_latents, eps, rows, steps)[0])
            if critic is None:
                continue
            states = States(chain.latents[step], timesteps[steps], chain.conditioning)
            output, found = guided_output(
                *(self.backbone, states, chain.uncond_conditioning, guidance_scale, "cond"),
                critic=critic,
                detach=True,
            )
            chain.model_outputs[step].copy_(output)
            values.append(_values(critic, found, states))
            if keep_features:
                _store(features, found, step, chain.num_steps)
        if critic is None:
            chain.model_outputs.fill_(math.nan)
        return replace(
            chain,
            log_probs=torch.zeros_like(chain.log_probs),
            values=torch.stack(values) if values else chain.values,
            features=features,
            forward_steps=self.objective.forward_steps(chain.num_steps),
        )


def _values(critic: Critic, features: Features, states: States) -> Tensor:
    values: Tensor = critic(features, states.sample, states.timestep, states.conditioning)
    return values.float()


def _store(features: dict[str, Tensor], found: Features, step: int, num_steps: int) -> None:
    for name, tensor in found.items():
        if name not in features:
            features[name] = tensor.new_empty((num_steps, *tensor.shape))
        features[name][step].copy_(tensor)
