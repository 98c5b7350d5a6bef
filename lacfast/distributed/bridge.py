"""Ranks that learn and ranks that sample: two worlds, and what travels between them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, distributed

from lacfast.distributed.messages import Outbox, receive, send
from lacfast.distributed.world import World

_END = -1
"""The order that there are no more."""


def require_learners(world: World, rollout_ranks: int) -> None:
    """
    Raises:
        ValueError: for more ranks that sample than leave one that learns.
    """
    if rollout_ranks and rollout_ranks >= world.size:
        raise ValueError(
            f"rollout_ranks={rollout_ranks} of {world.size} leave no rank that learns; start at least "
            f"{rollout_ranks + 1} processes with torchrun (a dry run: --gpus {rollout_ranks + 1}), or leave "
            "rollout_ranks out: every rank does both"
        )


@dataclass(frozen=True)
class Route:
    """Rows of this rank's share of a batch that a rank of the other world has."""

    peer: int
    """Its rank among all."""
    rows: slice
    """Rows of this rank's share."""


class Bridge:
    """Orders and weights go from the first rank to all that sample, rows from these to all that learn.

    The last ranks sample. What is sent goes from host to host in the background, see `messages`.
    """

    def __init__(self, world: World, rollout_ranks: int, *, staleness: int) -> None:
        """All ranks call it.

        Args:
            world: of all ranks.
            rollout_ranks: how many of them, the last ones, sample.
            staleness: rollouts that may be made before the one that is learned from.

        Raises:
            ValueError: see `require_learners`.
        """
        require_learners(world, rollout_ranks)
        self.learners = world.size - rollout_ranks
        self.rollout_ranks = rollout_ranks
        self.is_learner = world.rank < self.learners
        self.own = world.split(self.learners)
        """The world of those that do the same as this rank."""
        self._world = world
        self._outbox = Outbox()
        self._under_way = staleness + 1
        """Rollouts that are ordered, and of which one that has been made may not have arrived."""
        self.bytes_sent = 0
        # Groups of their own: a sum among learners must not wait for a rollout that is on its way.
        self._orders = distributed.new_group(
            [0, *range(self.learners, world.size)], backend="gloo", timeout=world.timeout
        )
        self._rows = distributed.new_group(backend="gloo", timeout=world.timeout)

    def routes(self, total: int) -> list[Route]:
        """Where the rows of this rank's share of a batch go to, or come from, in their order."""
        own = self.own.share(total)
        first, size = (self.learners, self.rollout_ranks) if self.is_learner else (0, self.learners)
        found = []
        for rank in range(size):
            other = World(rank, size).share(total)
            start = max(own.first, other.first)
            stop = min(own.first + own.count, other.first + other.count)
            if start < stop:
                found.append(Route(first + rank, slice(start - own.first, stop - own.first)))
        return found

    def order(self, number: int, weights: Sequence[Tensor] = ()) -> None:
        """Ask for rollout `number`, by these weights or by those of the order before; the first rank does."""
        flat = _flat(weights)
        self._tell([torch.tensor([number, flat.numel()]), *[flat] * (flat.numel() > 0)])

    def end(self) -> None:
        """Tell all that sample that nothing more is wanted now; the first rank does."""
        self._tell([torch.tensor([_END, 0])])

    def _tell(self, messages: list[Tensor]) -> None:
        with self._world.waiting("an order"):
            told = partial(distributed.broadcast, src=0, group=self._orders, async_op=True)
            self._outbox.keep([(told(message), message) for message in messages])
            # The end may be on its way besides.
            self._outbox.wait(but=self._under_way + 1)
        self.bytes_sent += sum(message.nbytes for message in messages)

    def next_order(self, weights: Sequence[Tensor]) -> int | None:
        """Wait for the next number that is asked for, None for the end; new values go into `weights`."""
        with self._world.waiting("the next order"):
            message = torch.empty(2, dtype=torch.int64)
            distributed.broadcast(message, src=0, group=self._orders)
            number, size = message.tolist()
            if size:
                flat = torch.empty(size, dtype=torch.uint8)
                distributed.broadcast(flat, src=0, group=self._orders)
                _spread(flat, weights)
        return None if number == _END else number

    def send(self, values: Mapping[int, Any]) -> None:
        """Send ranks of the other world a record each, of one rollout, without waiting for it.

        Waits for those of earlier rollouts to arrive: a rank that learns orders the next when it has one.

        Raises:
            LostRankError: when another rank ended or hangs.
        """
        parts = [part for peer, value in values.items() for part in send(value, peer, self._rows)]
        self.bytes_sent += sum(tensor.nbytes for _, tensor in parts)
        self._outbox.keep(parts)
        with self._world.waiting("what it sent to arrive"):
            self._outbox.wait(but=self._under_way)

    def receive(self, peer: int) -> Any:
        """The next record of a rank of the other world; see `messages.receive`."""
        return receive(peer, self._rows)

    def flush(self) -> None:
        """Go on when everything that was sent has arrived.

        Raises:
            LostRankError: when another rank ended or hangs.
        """
        with self._world.waiting("what it sent to arrive"):
            self._outbox.wait()


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    """The bytes of tensors on the host, one after the other."""
    parts = [tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8) for tensor in tensors]
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.uint8)


@torch.no_grad()
def _spread(flat: Tensor, tensors: Sequence[Tensor]) -> None:
    """Give tensors the bytes of `flat`, in place."""
    for tensor, part in zip(tensors, torch.split(flat, [each.nbytes for each in tensors]), strict=True):
        # A part may begin where no number of the dtype may.
        tensor.copy_(part.clone().view(tensor.dtype).view(tensor.shape))
