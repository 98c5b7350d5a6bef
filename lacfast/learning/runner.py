"""How the parts of an optimizer step run: as they come, or on captured graphs whose memory stays."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import TypeVar

from torch import Tensor
from torch.optim import Optimizer

from lacfast.learning.batches import CriticBatch, PolicyBatch
from lacfast.learning.optimizers import make_capturable, parameters_of
from lacfast.learning.pairs import Pairs, even_size
from lacfast.ops.backend import forced_backend
from lacfast.records import Static
from lacfast.runtime.graph import GraphRunner, StaticStep

Batch = TypeVar("Batch", PolicyBatch, CriticBatch)

ROUNDING = 1e-3
"""Relative error of gradients: attention and convolutions may add theirs up in any order, in bfloat16 too."""


class UpdateRunner:
    """Runs the parts of an optimizer step as they come.

    GraphedUpdate is the other way: gradients stay where they are and shapes never change.
    """

    keeps_gradients = False
    """Whether the gradients' memory is kept between optimizer steps."""

    def size(self, pairs: int, limit: int) -> int:
        """Pairs in each microbatch of a minibatch, at most `limit`."""
        return even_size(pairs, limit)

    def shaped(self, pairs: Pairs, size: int) -> tuple[Pairs, Tensor | None]:
        """The pairs to run for a microbatch, and the mask of those that count; None: all."""
        return pairs, None

    def gradient(self, run: Callable[[Batch], None], batch: Batch) -> None:
        """Run forward and backward of a microbatch."""
        run(batch)

    def optimize(self, run: Callable[[], None], optimizer: Optimizer) -> None:
        """Run the clip of the gradients and the optimizer's step."""
        run()

    def check_addresses(self) -> None:
        """
        Raises:
            ValueError: for a parameter that was replaced since a graph was captured.
        """

    def release(self) -> None:
        """Free what was captured: what it reads is about to be replaced."""


EAGER = UpdateRunner()


class GraphedUpdate(UpdateRunner):
    """Forward and backward of a microbatch as one graph, clip and optimizer step as another.

    Microbatches are copied to where the graph reads them; those that end a minibatch are padded, so that
    there is one shape. Gradients, sums and moments stay where they are.
    """

    keeps_gradients = True

    def __init__(
        self,
        name: str,
        graphs: GraphRunner,
        weights: Callable[[], dict[str, Tensor]],
        sums: Callable[[], list[Tensor]],
        signature: Callable[[], Hashable],
    ) -> None:
        """
        Args:
            name: whose steps these are, for messages.
            graphs: captures and replays.
            weights: everything that forward and backward read and that its owner could move, by name.
            sums: what the steps add to besides the gradients.
            signature: what else a forward depends on, as the adapters that are active.
        """
        self.name = name
        self.graphs = graphs
        self.weights = weights
        self.sums = sums
        self.signature = signature
        self._size: int | None = None
        self._gradients: dict[Hashable, tuple[Static, StaticStep]] = {}
        self._optimizer: StaticStep | None = None

    def size(self, pairs: int, limit: int) -> int:
        # The first minibatch is the largest. A smaller size comes when memory ran out.
        self._size = even_size(pairs, limit) if self._size is None else min(self._size, limit)
        return self._size

    def shaped(self, pairs: Pairs, size: int) -> tuple[Pairs, Tensor | None]:
        return pairs.padded(size)

    def gradient(self, run: Callable[[Batch], None], batch: Batch) -> None:
        key = (batch.layout, forced_backend(), self.signature())
        if key not in self._gradients:
            own = batch.clone()
            step = StaticStep(
                name=f"the {self.name}'s microbatch of {len(batch.targets)} pairs",
                run=lambda: run(own),
                written=self._written,
                read=self.weights,
                rounding=ROUNDING,
            )
            self._gradients[key] = own, step
        static, step = self._gradients[key]
        if self.graphs.is_eager(step):
            run(batch)
            return
        static.copy_(batch)
        self.graphs.run(step)

    def optimize(self, run: Callable[[], None], optimizer: Optimizer) -> None:
        if self._optimizer is None:
            make_capturable(optimizer)

            def written() -> list[Tensor]:
                moments = [tensor for state in optimizer.state.values() for tensor in state.values()]
                return [*parameters_of(optimizer), *moments, *self._written()]

            name = f"the {self.name}'s optimizer step"
            self._optimizer = StaticStep(name=name, run=run, written=written, read=self.weights)
        self.graphs.run(self._optimizer)

    def check_addresses(self) -> None:
        for step in self._steps():
            self.graphs.check_addresses(step)

    def release(self) -> None:
        for step in self._steps():
            self.graphs.release(step)
        self._gradients.clear()
        self._optimizer = None
        # The next minibatch may be a larger one.
        self._size = None

    def _steps(self) -> list[StaticStep]:
        optimizer = [] if self._optimizer is None else [self._optimizer]
        return [*(step for _, step in self._gradients.values()), *optimizer]

    def _written(self) -> list[Tensor]:
        """Gradients that exist, and the sums."""
        return [*(each.grad for each in self.weights().values() if each.grad is not None), *self.sums()]
