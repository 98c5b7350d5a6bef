"""From a rollout to microbatches: (sample, step) pairs in random order, and what the update reads of them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from lacfast.critic.trunk import Features
from lacfast.policy import States
from lacfast.records import Advantages, Conditioning, NoiseKey, Rollout


class StateSource(Protocol):
    """What states are gathered from: a rollout, or what is kept of one."""

    @property
    def latents(self) -> Tensor:
        """(T or T + 1, B, ...)"""

    @property
    def features(self) -> Features:
        """name -> (T, B, ...), what the critic reads."""

    @property
    def conditioning(self) -> Conditioning:
        """(B, ...)"""

    @property
    def num_steps(self) -> int: ...

    @property
    def batch_size(self) -> int: ...


@dataclass(frozen=True)
class Pairs:
    """Flattened (step, row) indices into a rollout, P of them."""

    steps: Tensor
    """(P,) int64 row of the transition table."""
    rows: Tensor
    """(P,) int64 trajectory."""
    position: Tensor
    """(P,) int64 index of the step among those that are paired."""

    def __len__(self) -> int:
        return len(self.rows)

    def select(self, index: Tensor | slice) -> Pairs:
        return Pairs(self.steps[index], self.rows[index], self.position[index])

    def split(self, size: int) -> Iterator[Pairs]:
        """Parts of `size`, the last one smaller."""
        for start in range(0, len(self), size):
            yield self.select(slice(start, start + size))

    def padded(self, size: int) -> tuple[Pairs, Tensor]:
        """`size` pairs, of which those beyond these repeat the last, and the mask (size,) of these."""
        index = torch.arange(size, device=self.rows.device)
        return self.select(index.clamp(max=len(self) - 1)), index < len(self)

    def shuffled(self, generator: torch.Generator) -> Pairs:
        """In an order that depends on the generator alone, which lives on the host."""
        order = torch.randperm(len(self), generator=generator)
        if self.rows.is_cuda:
            # From pinned memory the copy does not make the host wait for the device.
            order = order.pin_memory().to(self.rows.device, non_blocking=True)
        return self.select(order.to(self.rows.device))


def even_size(count: int, limit: int) -> int:
    """The size of the fewest equal parts of `count` that hold at most `limit` each."""
    return math.ceil(count / math.ceil(count / limit))


def all_pairs(steps: Tensor, batch_size: int) -> Pairs:
    """Every pair of one of the `steps` (K,) and a trajectory."""
    position = torch.arange(len(steps), device=steps.device).repeat_interleave(batch_size)
    rows = torch.arange(batch_size, device=steps.device).repeat(len(steps))
    return Pairs(steps[position], rows, position)


def all_states(source: StateSource) -> Pairs:
    """The pairs that the critic learns from: every state, also those whose step is deterministic."""
    return all_pairs(torch.arange(source.num_steps, device=source.latents.device), source.batch_size)


def minibatches(
    pairs: Pairs, count: int, generator: torch.Generator, *, fraction: float = 1.0
) -> Iterator[Pairs]:
    """A random `fraction` of the pairs in `count` parts of about equal size."""
    chosen = math.ceil(fraction * len(pairs))
    return next(pairs.shuffled(generator).split(chosen)).split(math.ceil(chosen / count))


@dataclass(frozen=True)
class PolicyBatch:
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
    old_values: Tensor | None
    """(P, M) of the rollout, for CriticConfig.value_clip."""
    noise: NoiseKey
    uncond_conditioning: Conditioning | None
    """(P, ...) with guidance, else None."""
    uncond_rows: int | None
    """None: all pairs run without the prompt too. Else the weights are those that made the rollout, and so
    many do: what the others would give is known from the rollout."""
    reference_output: Tensor | None
    """(P, ...) of the reference model, after guidance. None: there is none, or it has yet to run."""
    share: Tensor
    """() of the minibatch that these pairs are, 1 if they are all."""
    mask: Tensor | None
    """(P,) False for pairs that only fill the batch up. None: all are real."""


@dataclass(frozen=True)
class CriticBatch:
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
    """(P,) as in PolicyBatch."""


def states_of(source: StateSource, timesteps: Tensor, pairs: Pairs) -> States:
    """The states of `pairs`; `timesteps` (T,) is the table's on the rollout's device."""
    return States(
        source.latents[pairs.steps, pairs.rows],
        timesteps[pairs.steps],
        source.conditioning.select(pairs.rows),
    )


def policy_batch(
    rollout: Rollout,
    advantages: Advantages,
    timesteps: Tensor,
    pairs: Pairs,
    *,
    share: Tensor,
    mask: Tensor | None = None,
    reference_outputs: Tensor | None = None,
    uncond_rows: int | None = None,
) -> PolicyBatch:
    """Gather what `pairs` need.

    Args:
        timesteps: (T,) on the rollout's device.
        share: see PolicyBatch.
        mask: see PolicyBatch.
        reference_outputs: (K, B, ...) at the trained steps, where they were computed before.
        uncond_rows: see PolicyBatch.
    """
    uncond = rollout.uncond_conditioning
    return PolicyBatch(
        states=states_of(rollout, timesteps, pairs),
        steps=pairs.steps,
        old_model_output=rollout.model_outputs[pairs.steps, pairs.rows],
        advantages=advantages.policy[pairs.position, pairs.rows],
        targets=advantages.targets[pairs.rows],
        old_values=rollout.values[pairs.steps, pairs.rows],
        noise=rollout.noise.select(pairs.rows),
        uncond_conditioning=None if uncond is None else uncond.select(pairs.rows),
        uncond_rows=uncond_rows,
        reference_output=None if reference_outputs is None else reference_outputs[pairs.position, pairs.rows],
        share=share,
        mask=mask,
    )


def critic_batch(
    source: StateSource,
    features: Features,
    targets: Tensor,
    timesteps: Tensor,
    pairs: Pairs,
    *,
    share: Tensor,
    mask: Tensor | None = None,
    old_values: Tensor | None = None,
) -> CriticBatch:
    """Gather what the critic reads of `pairs` besides their `features` (P, ...); old_values (T, B, M)."""
    return CriticBatch(
        states=states_of(source, timesteps, pairs),
        features=features,
        targets=targets[pairs.rows],
        old_values=None if old_values is None else old_values[pairs.steps, pairs.rows],
        share=share,
        mask=mask,
    )
