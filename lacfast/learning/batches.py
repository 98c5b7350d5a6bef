"""Microbatches of policy and critic, and the sources that they are gathered from."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lacfast.critic.states import StateSource, gathered
from lacfast.critic.trunk import Features
from lacfast.learning.pairs import Pairs, all_pairs, all_states, states_of
from lacfast.policy import States
from lacfast.records import Advantages, Conditioning, NoiseKey, Rollout, Static
from lacfast.runtime.host_memory import Staging

MEASURED = 8
"""Pairs of the first optimizer step whose unconditional half runs though it is known: what remains of the
measure of how far the update's forward is from the rollout's."""


@dataclass(frozen=True)
class PolicyBatch(Static):
    """A microbatch of the policy's update: all tensors that it reads, so that it is a function of them."""

    states: States
    steps: Tensor
    """(P,) int64 row of the transition table."""
    old_model_output: Tensor
    """(P, ...) of the rollout, after guidance."""
    advantages: Tensor
    """(P,)"""
    targets: Tensor
    """(P, M) of the value function."""
    old_values: Tensor
    """(P, M) of the rollout, for CriticConfig.value_clip."""
    noise: NoiseKey
    uncond_conditioning: Conditioning | None
    """(P, ...) with guidance, else None."""
    uncond_rows: int | None
    """None: all pairs run without the prompt too. Else the weights are those that made the rollout, and so
    many do: what the others would give is known from the rollout."""
    anchor_output: Tensor | None
    """(P, ...) of the anchor, after guidance. None: there is none, or it has yet to run."""
    clean: Tensor | None
    """(P, ...) latents whose noised states these are. None: the states of a chain."""
    share: Tensor
    """() of the minibatch that these pairs are, 1 if they are all."""
    mask: Tensor | None
    """(P,) False for pairs that only fill the batch up. None: all are real."""


@dataclass(frozen=True)
class PolicySource:
    """A rollout as the policy learns from it."""

    rollout: Rollout
    advantages: Advantages
    timesteps: Tensor
    """(T,) on the rollout's device."""
    anchor_outputs: Tensor | None = None
    """(K, B, ...) at the trained steps, where they were computed before."""
    is_known: bool = False
    """The weights are those that made the rollout, so but for MEASURED pairs the unconditional half need not
    run."""

    @property
    def pairs(self) -> Pairs:
        """Every trajectory at the steps that are trained."""
        return all_pairs(self.advantages.steps, self.rollout.batch_size)

    def batch(
        self, pairs: Pairs, share: Tensor, mask: Tensor | None = None, *, is_first: bool = False
    ) -> PolicyBatch:
        """See Source."""
        rollout, advantages, anchored = self.rollout, self.advantages, self.anchor_outputs
        uncond = rollout.uncond_conditioning
        return PolicyBatch(
            states=states_of(rollout, self.timesteps, pairs),
            steps=pairs.steps,
            old_model_output=rollout.model_outputs[pairs.steps, pairs.rows],
            advantages=advantages.policy[pairs.position, pairs.rows],
            targets=advantages.targets[pairs.rows],
            old_values=rollout.values[pairs.steps, pairs.rows],
            noise=rollout.noise.select(pairs.rows),
            uncond_conditioning=None if uncond is None else uncond.select(pairs.rows),
            uncond_rows=(MEASURED if is_first else 0) if self.is_known else None,
            anchor_output=None if anchored is None else anchored[pairs.position, pairs.rows],
            clean=None if rollout.forward_steps is None else rollout.clean_latents[pairs.rows],
            share=share,
            mask=mask,
        )


@dataclass(frozen=True)
class CriticBatch(Static):
    """A microbatch of the critic's update."""

    states: States
    features: Features
    """name -> (P, ...), what the rollout kept for the critic."""
    targets: Tensor
    """(P, M)"""
    old_values: Tensor | None
    """(P, M) of the rollout, for CriticConfig.value_clip."""
    share: Tensor
    """() of the minibatch that these pairs are."""
    mask: Tensor | None
    """(P,) as in Source.batch."""


@dataclass(frozen=True)
class CriticSource:
    """States with what they were worth."""

    states: StateSource
    targets: Tensor
    """(B, M) standardised, in the critic's units of today."""
    timesteps: Tensor
    """(T,) on the states' device."""
    old_values: Tensor | None = None
    """(T, B, M) of the rollout in today's units, for CriticConfig.value_clip. None: values move freely."""

    @property
    def pairs(self) -> Pairs:
        """Every state, also those whose step is deterministic."""
        return all_states(self.states)

    def batch(
        self, pairs: Pairs, share: Tensor, mask: Tensor | None = None, *, is_first: bool = False
    ) -> CriticBatch:
        """See Source."""
        old = self.old_values
        return CriticBatch(
            states=states_of(self.states, self.timesteps, pairs),
            features={name: kept[pairs.steps, pairs.rows] for name, kept in self.states.features.items()},
            targets=self.targets[pairs.rows],
            old_values=None if old is None else old[pairs.steps, pairs.rows],
            share=share,
            mask=mask,
        )


@dataclass(frozen=True)
class GatheredSource:
    """A minibatch of states that were kept on the host, on the device before it is learned from."""

    states: States
    features: Features
    """name -> (P, ...)"""
    targets: Tensor
    """(P, M) standardised, in the critic's units of today."""

    @property
    def pairs(self) -> Pairs:
        """All P of them; a row is the place in the minibatch."""
        rows = torch.arange(len(self.targets), device=self.targets.device)
        return Pairs(torch.zeros_like(rows), rows, rows)

    def batch(
        self, pairs: Pairs, share: Tensor, mask: Tensor | None = None, *, is_first: bool = False
    ) -> CriticBatch:
        """See Source."""
        rows, states = pairs.rows, self.states
        return CriticBatch(
            states=States(states.sample[rows], states.timestep[rows], states.conditioning.select(rows)),
            features={name: kept[rows] for name, kept in self.features.items()},
            targets=self.targets[rows],
            old_values=None,
            share=share,
            mask=mask,
        )


def critic_minibatch(
    source: CriticSource, minibatch: Pairs, staging: Staging
) -> tuple[CriticSource | GatheredSource, Pairs]:
    """A minibatch as the critic's update takes it: gathered here where its states lie on the host.

    Args:
        source: of the states; its targets and timesteps are on the device.
        minibatch: pairs of it, where its states lie.
        staging: of the device.
    """
    if source.states.latents.device == staging.device:
        return source, minibatch
    found = gathered(source.states, minibatch.steps, minibatch.rows, staging)
    states = States(found.sample, source.timesteps[found.steps], found.conditioning)
    ahead = GatheredSource(states, found.features, source.targets[found.rows])
    return ahead, replace(ahead.pairs, elsewhere=minibatch.elsewhere, masked=minibatch.masked)
