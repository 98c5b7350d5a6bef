"""From a rollout to minibatches: (sample, step) pairs in random order."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lacfast.critic.states import StateSource
from lacfast.distributed import Share
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
    elsewhere: int = 0
    """Pairs of the same minibatch that other ranks have."""
    batch_size: int | None = None
    """Trajectories, where these are all pairs with them."""
    masked: int = 0
    """Pairs at the end that only fill up, where all ranks need as many."""

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def counted(self) -> int:
        """Pairs that count."""
        return len(self) - self.masked

    @property
    def total(self) -> int:
        """Pairs of the minibatch that count, here and elsewhere."""
        return self.counted + self.elsewhere

    def select(self, index: Tensor | slice) -> Pairs:
        return Pairs(self.steps[index], self.rows[index], self.position[index])

    def split(self, size: int) -> Iterator[Pairs]:
        """Parts of `size`, the last one smaller."""
        if len(self):
            columns = (torch.split(column, size) for column in (self.steps, self.rows, self.position))
            left = self.counted
            for part in zip(*columns, strict=True):
                pairs = Pairs(*part)
                yield replace(pairs, masked=len(pairs) - min(max(left, 0), len(pairs)))
                left -= len(pairs)

    def padded(self, size: int) -> tuple[Pairs, Tensor]:
        """`size` pairs, those beyond these repeat the last, and the mask (size,) of those that count."""
        device = self.rows.device
        mask = torch.arange(size, device=device) < self.counted
        if len(self) == size:
            return self, mask
        return self.select(padding_rows(len(self), size, device)), mask


GOLDEN_RATIO = (math.sqrt(5) - 1) / 2


class Shuffled:
    """The pairs of a batch in random order, those of this rank and the gaps that others fill.

    The order depends on the generator alone: it is the same on every rank, and for every number of them.
    """

    def __init__(
        self,
        pairs: Pairs,
        generator: torch.Generator,
        share: Share | None = None,
        *,
        draw: str = "free",
        even: bool = False,
    ) -> None:
        """
        Args:
            pairs: of this rank, as `all_pairs` has them.
            generator: on the host.
            share: of the batch that this rank has. None: all of it.
            draw: PPOConfig.minibatch_draw.
            even: every rank gets as many pairs as the one that has most, masked ones at the end.
        """
        self._before: list[int] | None = None
        self._owners: Tensor | None = None
        self.total = len(pairs) if share is None else len(pairs) // share.count * share.total
        if draw == "stratified":
            batch = pairs.batch_size if share is None else share.total
            assert batch is not None, "all_pairs tells the batch size, which would be a wait on the device"
            order = stratified_order(self.total // batch, batch, generator)
        else:
            order = torch.randperm(self.total, generator=generator)
        if share is not None and share.count < share.total:
            if even:
                self._owners = share.owners(order % share.total)
            rows = order % share.total - share.first
            is_own = (rows >= 0) & (rows < share.count)
            order = (order // share.total * share.count + rows)[is_own]
            self._before = [0, *is_own.cumsum(dim=0).tolist()]
        self._pairs = pairs.select(to_device(order, pairs.rows.device))

    def between(self, first: int, behind: int) -> Pairs:
        """This rank's pairs among those at the places `first` to `behind`."""
        if self._before is None:
            return self._pairs.select(slice(first, behind))
        start, count = self._before[first], self._before[behind] - self._before[first]
        own = self._pairs.select(slice(start, start + count))
        most = count if self._owners is None else int(self._owners[first:behind].bincount().max())
        if most > count:
            # Any pair will do: behind these, or before them at the end.
            places = torch.arange(start, start + most, device=self._pairs.rows.device)
            places[count:] %= len(self._pairs)
            own = replace(self._pairs.select(places), masked=most - count)
        return replace(own, elsewhere=behind - first - count)


def stratified_order(steps: int, batch: int, generator: torch.Generator) -> Tensor:
    """An order of the pairs of K steps and B trajectories: K layers, each with every trajectory once.

    Which step a trajectory has in a layer is random. Within a layer trajectories follow their multiples of
    the golden ratio, from a random place on, so that any stretch of it has as many of every part of the batch
    (H. Niederreiter, Random Number Generation and Quasi-Monte Carlo Methods, SIAM 1992, chapter 3).

    Returns:
        (K B,) int64 indices as `all_pairs` counts: step position times B, plus trajectory.
    """
    step = torch.rand(steps, batch, generator=generator).argsort(dim=0)
    places = torch.arange(batch) * GOLDEN_RATIO + torch.rand(steps, 1, generator=generator)
    rows = (places % 1).argsort(dim=1)
    return (step.gather(1, rows) * batch + rows).flatten()


def even_size(count: int, limit: int) -> int:
    """The size of the fewest equal parts of `count` that hold at most `limit` each; 1 for no pairs."""
    return math.ceil(count / math.ceil(count / limit)) if count else 1


def all_pairs(steps: Tensor, batch_size: int) -> Pairs:
    """Every pair of one of the `steps` (K,) and a trajectory."""
    position = torch.arange(len(steps), device=steps.device).repeat_interleave(batch_size)
    rows = torch.arange(batch_size, device=steps.device).repeat(len(steps))
    return Pairs(steps[position], rows, position, batch_size=batch_size)


def all_states(source: StateSource) -> Pairs:
    """The pairs that the critic learns from: every state, also those whose step is deterministic."""
    return all_pairs(torch.arange(source.num_steps, device=source.latents.device), source.batch_size)


def minibatches(
    pairs: Pairs,
    count: int,
    generator: torch.Generator,
    *,
    fraction: float = 1.0,
    share: Share | None = None,
    draw: str = "free",
    even: bool = False,
) -> Iterator[Pairs]:
    """A random `fraction` of the pairs in `count` parts, whose sizes differ by one at most over all ranks.

    Args:
        pairs: of this rank, as `all_pairs` has them.
        count: of minibatches.
        generator: on the host, the same on every rank.
        fraction: of all pairs.
        share: of the batch that this rank has. None: all of it.
        draw: PPOConfig.minibatch_draw.
        even: see Shuffled.

    Raises:
        ValueError: for fewer pairs than parts.
    """
    shuffled = Shuffled(pairs, generator, share, draw=draw, even=even)
    chosen = math.ceil(fraction * shuffled.total)
    if chosen < count:
        raise ValueError(
            f"{chosen} of {shuffled.total} (sample, step) pairs make no {count} minibatches; lower "
            "num_minibatches (critic_minibatches), or raise batch_size or timestep_fraction"
        )
    size, larger = divmod(chosen, count)
    first = 0
    for part in range(count):
        behind = first + size + (part < larger)
        yield shuffled.between(first, behind)
        first = behind


def states_of(source: StateSource, timesteps: Tensor, pairs: Pairs) -> States:
    """The states of `pairs`; `timesteps` (T,) is the table's on the rollout's device."""
    return States(
        source.latents[pairs.steps, pairs.rows],
        timesteps[pairs.steps],
        source.conditioning.select(pairs.rows),
    )
