"""One optimizer step on a minibatch: begin, the gradients of its microbatches, finish.

Nothing here waits for the device: what a step did is a record on the device, which the caller reads.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable
from functools import partial
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lacfast.config import PPOConfig
from lacfast.distributed import ALONE, World
from lacfast.distributed.sharding import divided, is_sharded, sum_behind
from lacfast.learning.gradient_guard import GradientGuard
from lacfast.learning.optimizers import parameters_of, set_rates
from lacfast.learning.pairs import Pairs
from lacfast.learning.runner import EAGER, Batch, UpdateRunner
from lacfast.learning.step_tables import StepTables
from lacfast.learning.totals import Totals
from lacfast.runtime.memory import BatchSize, DoesNotFitError
from lacfast.runtime.profiling import each, span

Batch_co = TypeVar("Batch_co", covariant=True)
Sums = TypeVar("Sums", bound=Totals)


class Source(Protocol[Batch_co]):
    """States, and what they are learned from, into which pairs point."""

    @property
    def pairs(self) -> Pairs:
        """All that a pass may learn from."""

    def batch(
        self, pairs: Pairs, share: Tensor, mask: Tensor | None = None, *, is_first: bool = False
    ) -> Batch_co:
        """Gather a microbatch.

        Args:
            pairs: P of them.
            share: () of the minibatch that they are, 1 if they are all.
            mask: (P,) False for pairs that only fill the batch up. None: all are real.
            is_first: it is the first of its minibatch.
        """


class Update(ABC, Generic[Batch, Sums]):
    """An optimizer and what its steps need again and again: sums, a size, a way to run."""

    def __init__(
        self,
        totals: type[Sums],
        optimizer: Optimizer,
        config: PPOConfig,
        guard: GradientGuard,
        runner: UpdateRunner = EAGER,
        world: World = ALONE,
        *,
        modules: Iterable[nn.Module | None] = (),
    ) -> None:
        """
        Args:
            totals: kind of a step's sums.
            optimizer: fused.
            config: of loss and clipping.
            guard: of its steps.
            runner: of a step's parts.
            world: the ranks that step together, each on its own pairs of a minibatch.
            modules: whose weights a backward reaches; sharded ones sum their gradients themselves.
        """
        self.optimizer = optimizer
        self.config = config
        self.guard = guard
        self.rates = [float(group["lr"]) for group in optimizer.param_groups]
        """Learning rates of the groups, before anything changes them."""
        self.runner = runner
        self.world = world
        self._divided = divided(modules)
        self.microbatch = BatchSize(
            config.microbatch_size, unit="pair", setting="ppo.microbatch_size", shrinks=not self._divided
        )
        self._totals_type = totals
        self._tables: StepTables | None = None
        self._reached: list[nn.Parameter] | None = None

    @property
    def tables(self) -> StepTables:
        """Tables of the rollout that is learned from."""
        assert self._tables is not None, "prepare comes first"
        return self._tables

    @abstractmethod
    def gradient(self, batch: Batch) -> None:
        """Forward and backward of one microbatch: adds to the weights' gradients and to the totals."""

    def set_rates(self, factor: float = 1.0) -> None:
        """Set the learning rates to `factor` times their own, and the guard's."""
        set_rates(self.optimizer, [rate * factor * self.guard.rate_factor for rate in self.rates])

    def prepare(self, tables: StepTables) -> None:
        """Take a rollout's tables; graphs and sums are kept as long as they lie in the same memory.

        Raises:
            ValueError: for a parameter or a moment that was replaced since a graph was captured.
        """
        if self._tables is not tables:
            self.runner.release()
            self._tables, self.totals = tables, self._totals_type.create(tables)
        self.runner.check_addresses()

    def find_size(self, source: Source[Batch], *, reserved: int) -> None:
        """Choose the microbatches' size for the memory that is free now, if none was given.

        Args:
            source: of the pairs that are tried.
            reserved: bytes that will be needed besides.
        """

        def probe(count: int) -> None:
            share = torch.ones_like(self.totals.loss)
            try:
                self.gradient(source.batch(source.pairs.select(slice(count)), share))
            finally:
                self.optimizer.zero_grad(set_to_none=True)

        is_given = bool(self.microbatch.size)
        self.microbatch.find(probe, self.guard.failed.device, reserved=reserved)
        if self._divided and not is_given:
            # Each of its forwards waits for those of the others.
            what = f"the microbatches of the {self.guard.what}"
            self.microbatch.size = min(self.world.entries([self.microbatch.size], what))

    def step(self, source: Source[Batch], minibatch: Pairs) -> Tensor:
        """One optimizer step on `minibatch`; returns its Totals.record, still on the device.

        It starts anew with microbatches of half the size when memory runs out.
        """
        attempt = partial(self._attempt, source, minibatch)
        return self.microbatch.run(attempt, len(minibatch), release=self.runner.release)

    def _attempt(self, source: Source[Batch], minibatch: Pairs, limit: int) -> Tensor:
        self.begin()
        size = self.microbatch_pairs(minibatch, limit)
        parts = list(minibatch.split(size))
        for number, part in enumerate(each("update/microbatch", parts)):
            pairs, mask = self.runner.shaped(part, size)
            # Filled on the device: a copy of a host number would wait for it.
            share = torch.full_like(self.totals.loss, part.counted / minibatch.total)
            batch = source.batch(pairs, share, mask, is_first=number == 0)
            sum_behind(self._divided, is_last=number == len(parts) - 1)
            self.runner.gradient(self.gradient, batch, is_first=number == 0)
        return self.finish()

    def microbatch_pairs(self, minibatch: Pairs, limit: int) -> int:
        """Pairs in each microbatch, at most `limit`: what evens out a rank's part of the minibatch."""
        return self.runner.size(math.ceil(minibatch.total / self.world.size), limit)

    def begin(self) -> None:
        """Forget gradients and sums of the step before."""
        self.runner.begin(self.optimizer)
        self.totals.zero_()

    def finish(self) -> Tensor:
        """Sum over the ranks, clip the gradients and step; returns as `step` does.

        Raises:
            DoesNotFitError: when memory runs out on one of several ranks. The others have its gradients and
                step with them, so it cannot begin anew with smaller microbatches.
        """
        if self.world.size == 1:
            self.runner.optimize(self._clip_and_step, self.optimizer)
            return self.totals.record()
        try:
            with span("update/all_reduce"):
                self._sum_over_ranks()
            self.runner.optimize(self._clip_and_step, self.optimizer)
            return self.totals.record()
        except torch.OutOfMemoryError as error:
            raise DoesNotFitError(
                f"rank {self.world.rank} ran out of memory at the optimizer step of the {self.guard.what}, "
                "which the other ranks take with its gradients; lower ppo.microbatch_size, train a LoRA in "
                f"place of all weights, or raise shard, and go on from the last checkpoint ({error})"
            ) from error

    def _sum_over_ranks(self) -> None:
        what = f"the gradients of the {self.guard.what}"
        if self._reached is None:
            # A rank without pairs of the first minibatch has no gradient at all.
            parameters = [each for each in parameters_of(self.optimizer) if not is_sharded(each)]
            here = [number for number, each in enumerate(parameters) if each.grad is not None]
            reached = sorted(set(self.world.entries(here, what)))
            self._reached = [parameters[number] for number in reached]
        for parameter in self._reached:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        gradients: list[Tensor] = [each.grad for each in self._reached if each.grad is not None]
        self.world.sum_([*gradients, *self.totals.sums], what, maxima=self.totals.maxima)

    def _clip_and_step(self) -> None:
        bound = self.config.max_grad_norm
        self.guard.step(self.optimizer, self.totals.grad_norm, max_grad_norm=bound)
