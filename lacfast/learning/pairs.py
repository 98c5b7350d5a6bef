"""From a rollout to minibatches: (sample, step) pairs in random order."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lacfast.critic.states import StateSource
from lacfast.policy import States
from lacfast.records import padding_rows
from lacfast.transfer import to_device


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
        device = self.rows.device
        rows = padding_rows(len(self), size, device)
        return self.select(rows), torch.arange(size, device=device) < len(self)

    def shuffled(self, generator: torch.Generator) -> Pairs:
        """The pairs in an order that depends on the generator alone, which lives on the host."""
        order = torch.randperm(len(self), generator=generator)
        return self.select(to_device(order, self.rows.device))


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
    """A random `fraction` of the pairs in `count` parts, whose sizes differ by one at most.

    Raises:
        ValueError: for fewer pairs than parts.
    """
    chosen = math.ceil(fraction * len(pairs))
    if chosen < count:
        raise ValueError(
            f"{chosen} of {len(pairs)} (sample, step) pairs make no {count} minibatches; lower "
            "num_minibatches (critic_minibatches), or raise batch_size or timestep_fraction"
        )
    shuffled = pairs.shuffled(generator)
    size, larger = divmod(chosen, count)
    first = 0
    for part in range(count):
        behind = first + size + (part < larger)
        yield shuffled.select(slice(first, behind))
        first = behind


def states_of(source: StateSource, timesteps: Tensor, pairs: Pairs) -> States:
    """The states of `pairs`; `timesteps` (T,) is the table's on the rollout's device."""
    return States(
        source.latents[pairs.steps, pairs.rows],
        timesteps[pairs.steps],
        source.conditioning.select(pairs.rows),
    )
