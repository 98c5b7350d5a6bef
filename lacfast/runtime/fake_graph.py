"""A graph without a GPU: records the dispatched operations of a step once and replays exactly those.

What a CUDA graph freezes is frozen here too: Python numbers, and the memory that a tensor had. So a test on
a CPU sees a stale argument as another result, and what cannot be captured as an error that names it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lacfast.runtime.trees import leaves, mapped


class CaptureError(RuntimeError):
    """A step does what a graph cannot hold."""


@dataclass(frozen=True)
class _Call:
    """One operation with the memory that its tensors had."""

    operation: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: tuple[tuple[int, Tensor], ...]
    """(position among the resulting tensors, tensor) of those that the operation allocated."""


class FakeGraph:
    """The interface of a captured CUDA graph over recorded operations.

    As with a CUDA graph, capture leaves no trace in memory and every replay runs on the same addresses. After
    a replay the step's intermediate tensors are NaN, for a graph's pool belongs to the next graph then.
    """

    def __init__(self, run: Callable[[], None], written: Sequence[Tensor]) -> None:
        """
        Args:
            run: the step.
            written: every tensor that lives outside the step and that it writes.

        Raises:
            CaptureError: for an operation that a graph cannot hold, or a write to any other outer tensor.
        """
        recorder = _Recorder({_memory_of(tensor) for tensor in written})
        try:
            with recorder:
                run()
        finally:
            recorder.restore()
        self._calls = recorder.calls
        self._poison()
        self.num_bytes = sum(storage.nbytes() for storage in recorder.own.values())

    @torch.no_grad()
    def replay(self) -> None:
        """Run the recorded operations on the recorded memory."""
        for call in self._calls:
            results = leaves(Tensor, call.operation(*call.args, **call.kwargs))
            for position, output in call.outputs:
                output.copy_(results[position])
        self._poison()

    def reset(self) -> None:
        """Give the memory back; nothing is replayed afterwards."""
        self._calls = []
        self.num_bytes = 0

    @torch.no_grad()
    def _poison(self) -> None:
        for call in self._calls:
            for _, output in call.outputs:
                if output.is_floating_point():
                    output.fill_(torch.nan)


class _Recorder(TorchDispatchMode):
    """Runs operations, records them, and keeps what outer memory held before."""

    def __init__(self, writable: set[int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.writable = writable
        self.calls: list[_Call] = []
        self.own: dict[int, torch.UntypedStorage] = {}
        self._before: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        _refuse_uncapturable(func, args, kwargs)
        for tensor in _written_arguments(func, args, kwargs):
            self._keep(func, tensor)
        # Aliases: a tensor whose data is swapped later would show its new memory, which a graph never sees.
        frozen_args, frozen_kwargs = mapped(Tensor, Tensor.detach, (args, kwargs))
        results = func(*args, **kwargs)
        outputs = self._allocated(results, leaves(Tensor, (args, kwargs)))
        # A view moves no data, and the recorded tensors are views already.
        if outputs or (func._schema.is_mutable and torch.Tag.inplace_view not in func.tags):
            self.calls.append(_Call(func, frozen_args, frozen_kwargs, outputs))
        return results

    def restore(self) -> None:
        """Undo what was written to outer memory while it was recorded."""
        for storage, before in self._before.values():
            storage.copy_(before)

    def _keep(self, func: Any, tensor: Tensor) -> None:
        storage, memory = tensor.untyped_storage(), _memory_of(tensor)
        if memory in self.own or memory in self._before:
            return
        if memory not in self.writable:
            raise CaptureError(
                f"{func} writes a tensor of shape {tuple(tensor.shape)} and dtype {tensor.dtype} that is not "
                "among the step's written tensors; list it there, or make it inside the step"
            )
        self._before[memory] = storage, storage.clone()  # type: ignore[no-untyped-call]

    def _allocated(self, results: Any, inputs: list[Tensor]) -> tuple[tuple[int, Tensor], ...]:
        known = {_memory_of(tensor) for tensor in inputs}
        outputs = []
        for position, result in enumerate(leaves(Tensor, results)):
            if _memory_of(result) not in known:
                self.own[_memory_of(result)] = result.untyped_storage()
                outputs.append((position, result.detach()))
        return tuple(outputs)


def _memory_of(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


Place = tuple[int, str]
"""Position and name of an argument."""


@cache
def _written_places(func: Any) -> tuple[Place, ...]:
    """The arguments that an operation writes."""
    return tuple(
        (position, argument.name)
        for position, argument in enumerate(func._schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    )


@cache
def _place(func: Any, name: str) -> Place | None:
    """An operation's argument of this name."""
    names = [argument.name for argument in func._schema.arguments]
    return (names.index(name), name) if name in names else None


@cache
def _has_tag(func: Any, *tags: torch.Tag) -> bool:
    return not set(tags).isdisjoint(func.tags)


def _argument(place: Place, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    position, name = place
    return args[position] if position < len(args) else kwargs.get(name)


def _written_arguments(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    return [
        tensor for place in _written_places(func) for tensor in leaves(Tensor, _argument(place, args, kwargs))
    ]


def _reads_values(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    indices = _place(func, "indices")
    if indices is not None and func.namespace == "aten":
        # The tag is there for masks; what is indexed by numbers has a known shape.
        given = leaves(Tensor, _argument(indices, args, kwargs))
        return any(index.dtype in (torch.bool, torch.uint8) for index in given)
    return _has_tag(func, torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)


def _refuse_uncapturable(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if _reads_values(func, args, kwargs):
        raise CaptureError(
            f"{func} makes the host wait for a value of the device, which a graph cannot; keep the decision "
            "in tensors (torch.where, index_select) or take it outside the step"
        )
    if func is torch.ops.aten.lift_fresh.default:
        raise CaptureError(
            "torch.tensor(...) copies a Python value from the host, which a graph would freeze; make the "
            "tensor before the step, or fill one with torch.full"
        )
    if _has_tag(func, torch.Tag.nondeterministic_seeded):
        # Fused attention carries the tag for a dropout that it is asked not to do.
        dropout = _place(func, "dropout_p")
        if dropout is None or _argument(dropout, args, kwargs):
            raise CaptureError(
                f"{func} draws from torch's generator, whose state is the host's; draw with "
                "lacfast.ops.normal_noise from a NoiseKey on the device, or switch dropout off: model.eval()"
            )
