"""How the parts of an optimizer step run: as they come, or on captured graphs whose memory stays."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar

from torch import Tensor
from torch.optim import Optimizer

from lacfast.learning.optimizers import make_capturable, parameters_of
from lacfast.learning.pairs import CriticBatch, Pairs, PolicyBatch, even_size
from lacfast.ops.backend import forced_backend
from lacfast.runtime.graph import GraphRunner, StaticStep

Batch = TypeVar("Batch", PolicyBatch, CriticBatch)

ROUNDING = 1e-3
"""Of gradients: attention and convolutions may add theirs up in any order, in bfloat16 too."""


class UpdateRunner:
    """How the parts of an optimizer step run: one after the other, as they come.

    lacfast.update_graph has the other way, where gradients stay where they are and shapes never change.
    """

    keeps_gradients = False
    """Whether the gradients' memory is kept between optimizer steps."""

    def size(self, what: str, pairs: int, limit: int) -> int:
        """Pairs in each microbatch of a minibatch, at most `limit`."""
        return even_size(pairs, limit)

    def shaped(self, pairs: Pairs, size: int) -> tuple[Pairs, Tensor | None]:
        """The pairs to run for a microbatch, and the mask of those that count; None: all."""
        return pairs, None

    def gradient(self, what: str, run: Callable[[Batch], None], batch: Batch) -> None:
        """Run forward and backward of a microbatch of the "policy" or the "critic"."""
        run(batch)

    def optimize(self, what: str, run: Callable[[], None], optimizer: Optimizer) -> None:
        """Run the clip of the gradients and the optimizer's step."""
        run()


EAGER = UpdateRunner()


class GraphedUpdate(UpdateRunner):
    """Forward and backward of a microbatch as one graph, clip and optimizer step as another.

    Microbatches are copied to where the graph reads them; those that end a minibatch are padded, so that
    there is one shape. Gradients, sums and moments stay where they are.
    """

    keeps_gradients = True

    def __init__(
        self,
        graphs: GraphRunner,
        parameters: Callable[[], Mapping[str, Tensor]],
        sums: Sequence[Tensor],
        signature: Callable[[], Hashable],
    ) -> None:
        """
        Args:
            graphs: captures and replays.
            parameters: everything that forward and backward read and that its owner could move, by name.
            sums: what the steps add to besides the gradients.
            signature: what else a forward depends on, as the adapters that are active.
        """
        self.graphs = graphs
        self.parameters = parameters
        self.sums = tuple(sums)
        self.signature = signature
        self._sizes: dict[str, int] = {}
        self._gradients: dict[Hashable, tuple[Any, StaticStep]] = {}
        self._optimizers: dict[str, StaticStep] = {}

    def size(self, what: str, pairs: int, limit: int) -> int:
        # The first minibatch is the largest. A smaller size comes when memory ran out.
        size = min(self._sizes.get(what, limit), limit)
        self._sizes[what] = even_size(pairs, size) if what not in self._sizes else size
        return self._sizes[what]

    def shaped(self, pairs: Pairs, size: int) -> tuple[Pairs, Tensor | None]:
        return pairs.padded(size)

    def gradient(self, what: str, run: Callable[[Batch], None], batch: Batch) -> None:
        key = (what, _signature(batch), forced_backend(), self.signature())
        if key not in self._gradients:
            static = _cloned(batch)
            step = StaticStep(
                name=f"the {what}'s microbatch of {len(batch.targets)} pairs",
                run=lambda: run(static),
                written=lambda: [*self._existing_gradients(), *self.sums],
                read=self.parameters,
                rounding=ROUNDING,
            )
            self._gradients[key] = static, step
        static, step = self._gradients[key]
        if self.graphs.is_eager(step):
            run(batch)
            return
        for target, source in zip(_tensors(static), _tensors(batch), strict=True):
            target.copy_(source)
        self.graphs.run(step)

    def optimize(self, what: str, run: Callable[[], None], optimizer: Optimizer) -> None:
        if what not in self._optimizers:
            make_capturable(optimizer)

            def written() -> list[Tensor]:
                moments = [tensor for state in optimizer.state.values() for tensor in state.values()]
                return [*parameters_of(optimizer), *moments, *self._existing_gradients(), *self.sums]

            self._optimizers[what] = StaticStep(
                name=f"the {what}'s optimizer step", run=run, written=written, read=self.parameters
            )
        self.graphs.run(self._optimizers[what])

    def check_addresses(self) -> None:
        """
        Raises:
            ValueError: for a parameter that was replaced since a graph was captured.
        """
        for step in self._steps():
            self.graphs.check_addresses(step)

    def release(self) -> None:
        """Free all graphs: what they read is about to be replaced."""
        for step in self._steps():
            self.graphs.release(step)
        self._gradients.clear()
        self._optimizers.clear()

    def _steps(self) -> list[StaticStep]:
        return [*(step for _, step in self._gradients.values()), *self._optimizers.values()]

    def _existing_gradients(self) -> list[Tensor]:
        return [tensor.grad for tensor in self.parameters().values() if tensor.grad is not None]


def _tensors(batch: Any) -> list[Tensor]:
    """All tensors of a record, those of the records and dicts in it too, in the order of its fields."""
    if isinstance(batch, Tensor):
        return [batch]
    if is_dataclass(batch):
        return [tensor for field in fields(batch) for tensor in _tensors(getattr(batch, field.name))]
    if isinstance(batch, dict):
        return [tensor for value in batch.values() for tensor in _tensors(value)]
    assert batch is None or isinstance(batch, int), f"no part of a capture's key: {type(batch).__name__}"
    return []


def _cloned(batch: Any) -> Any:
    """The record with tensors of its own."""
    if isinstance(batch, Tensor):
        return batch.clone()
    if is_dataclass(batch) and not isinstance(batch, type):
        return replace(batch, **{field.name: _cloned(getattr(batch, field.name)) for field in fields(batch)})
    if isinstance(batch, dict):
        return {name: _cloned(value) for name, value in batch.items()}
    return batch


def _signature(batch: Any) -> Hashable:
    """What a capture depends on: which tensors there are, their shapes and dtypes; and plain numbers."""
    if isinstance(batch, Tensor):
        return tuple(batch.shape), batch.dtype
    if is_dataclass(batch):
        return tuple((field.name, _signature(getattr(batch, field.name))) for field in fields(batch))
    if isinstance(batch, dict):
        return tuple((name, _signature(value)) for name, value in batch.items())
    assert batch is None or isinstance(batch, int)
    return batch
