"""How the parts of an optimizer step run: as they come, or on captured graphs whose memory stays."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import TypeVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from lacfast.learning.batches import CriticBatch, PolicyBatch
from lacfast.learning.optimizers import make_capturable, moments_of, parameters_of, rates_of
from lacfast.learning.pairs import Pairs, even_size
from lacfast.ops.backend import forced_backend
from lacfast.runtime.graph import GraphRunner, StaticStep

Batch = TypeVar("Batch", PolicyBatch, CriticBatch)

ROUNDING = 1e-3
"""Relative error of gradients: attention and convolutions may add theirs up in any order, in bfloat16 too."""


class UpdateRunner:
    """Runs the parts of an optimizer step as they come.

    GraphedUpdate is the other way: gradients stay where they are and shapes never change.
    """

    def begin(self, optimizer: Optimizer) -> None:
        """Forget the gradients of the step before."""
        optimizer.zero_grad(set_to_none=True)

    def size(self, pairs: int, limit: int) -> int:
        """Pairs in each microbatch of a minibatch, at most `limit`."""
        return even_size(pairs, limit)

    def shaped(self, pairs: Pairs, size: int) -> tuple[Pairs, Tensor | None]:
        """The pairs to run for a microbatch, and the mask of those that count; None: all."""
        return pairs.padded(len(pairs)) if pairs.masked else (pairs, None)

    def gradient(self, run: Callable[[Batch], None], batch: Batch, *, is_first: bool) -> None:
        """Run forward and backward of a microbatch; those behind a step's first have one layout."""
        run(batch)

    def optimize(self, run: Callable[[], None], optimizer: Optimizer) -> None:
        """Run the clip of the gradients and the optimizer's step."""
        run()

    def check_addresses(self) -> None:
        """
        Raises:
            ValueError: for a parameter or a moment that was replaced since a graph was captured.
        """

    def release(self) -> None:
        """Free what was captured: what it reads is about to be replaced."""


EAGER = UpdateRunner()


class GradientMemory:
    """The gradients that graphs write: alive, and given back to weights whose `grad` became another.

    One for all updates of a model, since a graph of the policy may write gradients of the critic.
    """

    def __init__(self, weights: Callable[[], dict[str, Tensor]]) -> None:
        """`weights`: those that may have gradients, by name."""
        self._weights = weights
        self._kept: dict[str, tuple[Tensor, Tensor]] = {}

    def keep(self) -> list[Tensor]:
        """Take over the gradients that exist, before a graph writes them; returns all that are kept."""
        for name, weight in self._weights().items():
            known, _ = self._kept.get(name, (None, None))
            if weight is not known and weight.grad is not None:
                self._kept[name] = weight, weight.grad
        return [gradient for _, gradient in self._kept.values()]

    def attach(self) -> None:
        """Give every weight the gradient that graphs write."""
        for weight, gradient in self._kept.values():
            if weight.grad is not gradient:
                weight.grad = gradient

    def named(self) -> dict[str, Tensor]:
        """What the weights have as gradients, of those that are kept."""
        return {
            f"the gradient of {name}": weight.grad
            for name, (weight, _) in self._kept.items()
            if weight.grad is not None
        }


class GraphedUpdate(UpdateRunner):
    """Forward and backward of a microbatch as one graph, clip and optimizer step as another.

    Microbatches are copied to where the graph reads them; those that end a minibatch are padded, so that
    there is one shape. Gradients, sums and moments stay where they are.
    """

    def __init__(
        self,
        name: str,
        graphs: GraphRunner,
        weights: Callable[[], dict[str, Tensor]],
        gradients: GradientMemory,
        sums: Callable[[], list[Tensor]],
        signature: Callable[[], Hashable],
    ) -> None:
        """
        Args:
            name: whose steps these are, for messages.
            graphs: captures and replays.
            weights: everything that forward and backward read and that its owner could move, by name.
            gradients: of these weights.
            sums: what the steps add to besides the gradients.
            signature: what else a forward depends on, as the adapters that are active.
        """
        self.name = name
        self.graphs = graphs
        self.weights = weights
        self.gradients = gradients
        self.sums = sums
        self.signature = signature
        self._size: int | None = None
        self._microbatches: dict[Hashable, tuple[list[Tensor], StaticStep]] = {}
        self._today: dict[bool, tuple[list[Tensor], StaticStep]] = {}
        """Microbatches of the optimizer step, by whether they are its first: a search walks over modules."""
        self._forward: Hashable = None
        """What `signature` says today."""
        self._optimizer: StaticStep | None = None

    def begin(self, optimizer: Optimizer) -> None:
        self.gradients.attach()
        optimizer.zero_grad(set_to_none=False)
        self._today.clear()
        self._forward = None

    def size(self, pairs: int, limit: int) -> int:
        # The first minibatch is the largest. A smaller size comes when memory ran out.
        self._size = even_size(pairs, limit) if self._size is None else min(self._size, limit)
        return self._size

    def shaped(self, pairs: Pairs, size: int) -> tuple[Pairs, Tensor | None]:
        return pairs.padded(size)

    def gradient(self, run: Callable[[Batch], None], batch: Batch, *, is_first: bool) -> None:
        if is_first not in self._today:
            self._today[is_first] = self._microbatch(run, batch)
        static, step = self._today[is_first]
        if self.graphs.is_eager(step):
            run(batch)
            return
        torch._foreach_copy_(static, batch.flat)
        self.graphs.run(step)

    def _microbatch(self, run: Callable[[Batch], None], batch: Batch) -> tuple[list[Tensor], StaticStep]:
        """What is captured for microbatches like `batch`, and where it reads them."""
        if self._forward is None:
            self._forward = self.signature()
        key = (batch.layout, forced_backend(), self._forward)
        if key not in self._microbatches:
            own = batch.clone()
            step = StaticStep(
                name=f"the {self.name}'s microbatch of {len(batch.targets)} pairs",
                run=lambda: run(own),
                written=self._written,
                read=self._read,
                rounding=ROUNDING,
            )
            self._microbatches[key] = own.flat, step
        return self._microbatches[key]

    def optimize(self, run: Callable[[], None], optimizer: Optimizer) -> None:
        if self._optimizer is None:
            make_capturable(optimizer)

            def written() -> list[Tensor]:
                return [*parameters_of(optimizer), *dict(moments_of(optimizer)).values(), *self._written()]

            def read() -> dict[str, Tensor]:
                return self._read() | dict(moments_of(optimizer)) | dict(rates_of(optimizer))

            name = f"the {self.name}'s optimizer step"
            self._optimizer = StaticStep(name=name, run=run, written=written, read=read)
        self.graphs.run(self._optimizer)

    def check_addresses(self) -> None:
        self.gradients.attach()
        self.graphs.check_addresses(*self._steps())

    def release(self) -> None:
        for step in self._steps():
            self.graphs.release(step)
        self._microbatches.clear()
        self._today.clear()
        self._optimizer = None
        # The next minibatch may be a larger one.
        self._size = None

    def _steps(self) -> list[StaticStep]:
        optimizer = [] if self._optimizer is None else [self._optimizer]
        return [*(step for _, step in self._microbatches.values()), *optimizer]

    def _read(self) -> dict[str, Tensor]:
        return self.weights() | self.gradients.named()

    def _written(self) -> list[Tensor]:
        return [*self.gradients.keep(), *self.sums()]
