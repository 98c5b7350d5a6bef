"""Rollouts of ranks that do nothing else: ordered with weights, made meanwhile, taken in by learners.

    learners        order 0, 1 | take 0, order 2, learn 0 | take 1, order 3, learn 1 | ...    (staleness 1)
    rollout ranks   make 0     | make 1                   | make 2                   | ...

A rollout is a function of its number, the seed and the weights, so who makes it, and when, changes nothing.
On the way it lies on hosts: at most `staleness` of them, besides the one that is learned from.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lacfast.distributed import Bridge, LostRankError
from lacfast.records import Rollout
from lacfast.rewards.reward import RewardError
from lacfast.rewards.workers import Workers
from lacfast.rollout.acting import ActingWeights
from lacfast.rollout.memory import RolloutMemory, on_device, rows_of, trajectory_bytes
from lacfast.rollout.scored import Scored
from lacfast.runtime.profiling import span


@dataclass(frozen=True)
class Made:
    """Rows of a rollout, as one rank sends them to another."""

    number: int
    rollout: Rollout
    error: RewardError | None
    seconds_waiting: float
    """Seconds that their maker had waited for the order."""


class RolloutRanks:
    """The ranks that sample, for one that learns."""

    def __init__(self, bridge: Bridge, acting: ActingWeights, batch_size: int, device: torch.device) -> None:
        """
        Args:
            bridge: to them.
            acting: what each rollout is made by.
            batch_size: trajectories of a rollout.
            device: where this rank learns.
        """
        self._bridge = bridge
        self._acting = acting
        self._batch_size = batch_size
        self._device = device
        self._receiver = Workers(1, "rollouts")
        self._under_way: dict[int, Future[list[Made]]] = {}
        self._version: int | None = None
        """Version of the weights that were sent last."""
        self._counted = 0
        """Bytes sent that some metrics have."""
        self.metrics: dict[str, float] = {}
        """What the rollout that was taken in last says of waiting and sending."""

    def order(self, number: int, last: int) -> None:
        """Order the rollouts from iteration `number` on, the next, to `last` that may be made by now."""
        for other in range(number, min(number + self._acting.staleness, last) + 1):
            if other not in self._under_way:
                self._order(other, number)

    def rollout(self, number: int, last: int) -> Scored:
        """The rollout of an iteration, with as many more under way as may be.

        Raises:
            LostRankError: when another rank ended or hangs.
        """
        self.order(number, max(number, last))
        start = time.perf_counter()
        with span("rollout/wait"), self._bridge.own.waiting(f"the rollout of iteration {number + 1}"):
            made = self._under_way.pop(number).result()
        waited = time.perf_counter() - start
        assert all(part.number == number for part in made), "orders are followed in their order"
        parts = [part.rollout for part in made]
        memory = RolloutMemory(self._batch_size, world=self._bridge.own)
        for part in parts:
            memory.add(on_device(part, self._device))
        rewards = {name: torch.cat([part.rewards[name] for part in parts]) for name in parts[0].rewards}
        self.metrics = {
            "seconds_learners_waited": waited,
            "seconds_rollout_ranks_waited": max(part.seconds_waiting for part in made),
            "rollout_bytes": sum(trajectory_bytes(part) * part.batch_size for part in parts),
            "weight_bytes": self._bridge.bytes_sent - self._counted,
        }
        self._counted = self._bridge.bytes_sent
        return memory.rollout().with_rewards(rewards), made[0].error

    def _order(self, number: int, now: int) -> None:
        if self._bridge.own.is_first:
            version = self._acting.version(number)
            is_new, self._version = version != self._version, version
            with span("rollout/order"):
                weights = self._acting.of(number, now)
                self._bridge.order(number, list(weights.values()) if is_new else ())
        routes = self._bridge.routes(self._batch_size)
        self._under_way[number] = self._receiver.submit(
            lambda: [self._bridge.receive(route.peer) for route in routes]
        )

    def end(self, *, wait: bool) -> None:
        """Let the ranks that sample go once they have made what was ordered; `wait` until it is here."""
        coming, self._version = list(self._under_way.values()), None
        self._under_way.clear()
        if self._bridge.own.is_first:
            self._bridge.end()
        if wait:
            for rollout in coming:
                rollout.result()
            self._bridge.flush()

    def close(self) -> None:
        """Go on when everything that was ordered and sent has arrived, or nobody is there who wants it."""
        with suppress(LostRankError):
            if self._version is not None:
                self.end(wait=False)
            self._receiver.close()
            self._bridge.flush()


def serve(
    bridge: Bridge, live: Mapping[str, Tensor], make: Callable[[int], Scored], batch_size: int
) -> Iterator[int]:
    """Make rollouts as long as they are wanted; yields the number of each.

    Args:
        bridge: to the ranks that learn.
        live: the tensors that training changes, which get the weights that come with an order.
        make: makes a rollout by the weights that the model has, with the others that sample.
        batch_size: trajectories of a rollout.

    Raises:
        LostRankError: when another rank ended or hangs.
    """
    weights = list(live.values())
    while True:
        start = time.perf_counter()
        with span("rollout/wait"):
            number = bridge.next_order(weights)
        if number is None:
            break
        waited = time.perf_counter() - start
        _send(bridge, number, make(number), waited, batch_size)
        yield number
    bridge.flush()


def _send(bridge: Bridge, number: int, scored: Scored, waited: float, batch_size: int) -> None:
    rollout, error = scored
    with span("rollout/send"):
        sent = {}
        for route in bridge.routes(batch_size):
            rows = replace(rows_of(rollout, route.rows), policy_version=None, share=None)
            sent[route.peer] = Made(number, rows, error, waited)
        bridge.send(sent)
