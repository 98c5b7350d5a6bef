"""Records sent from one rank to another: what is not a tensor is pickled, tensors travel as they are.

They go from host to host, in the background: a GPU that sends would spend its processors on that, and its
memory on what the receiver does not want yet. torch's own object sends wait for the receiver, and copy every
tensor into the pickle and out of it.

Pickles, because ranks trust each other anyway: torch's own collectives of objects, which all ranks use,
unpickle what they get. A wire without them would close one of several doors behind the same rendezvous; see
SECURITY.md.
"""

from __future__ import annotations

import io
import pickle
from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, distributed


class _Pickler(pickle.Pickler):
    """Leaves tensors out, and notes which."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self.tensors: list[Tensor] = []

    def persistent_id(self, value: Any) -> tuple[torch.dtype, torch.Size] | None:
        if not isinstance(value, Tensor):
            return None
        self.tensors.append(value.detach().cpu().contiguous())
        return value.dtype, value.shape


class _Unpickler(pickle.Unpickler):
    """Makes tensors without values in the places of those that were left out, and notes them."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self.tensors: list[Tensor] = []

    def persistent_load(self, layout: tuple[torch.dtype, torch.Size]) -> Tensor:
        dtype, shape = layout
        self.tensors.append(torch.empty(shape, dtype=dtype))
        return self.tensors[-1]


class Outbox:
    """What was sent and has perhaps not arrived: it stays in memory until then."""

    def __init__(self) -> None:
        self._going: deque[list[tuple[Any, Tensor]]] = deque()

    def __len__(self) -> int:
        return len(self._going)

    def keep(self, parts: list[tuple[Any, Tensor]]) -> None:
        """Keep tensors of one message, each with the work that sends it."""
        self._going.append(parts)

    def wait(self, *, but: int = 0) -> None:
        """Go on when every message but the last `but` has arrived, and forget those that have.

        Gloo's work that sends does not tell whether it is done, and a failure of it, but to who waits for it.

        Raises:
            RuntimeError: for one that cannot arrive.
        """
        while len(self._going) > but:
            for work, _ in self._going[0]:
                work.wait()
            self._going.popleft()


def send(value: Any, rank: int, group: Any) -> list[tuple[Any, Tensor]]:
    """Send a record to a rank, without waiting for it; returns what an outbox keeps."""
    file = io.BytesIO()
    pickler = _Pickler(file)
    pickler.dump(value)
    rest = torch.frombuffer(bytearray(file.getvalue()), dtype=torch.uint8)
    # One after the other between two ranks, so they arrive in their order.
    parts = [torch.tensor([rest.numel()]), rest, *_worth_sending(pickler.tensors)]
    return [(distributed.isend(part, rank, group=group), part) for part in parts]


def receive(rank: int, group: Any) -> Any:
    """The next record that a rank sends, with its tensors on the host.

    Raises:
        RuntimeError: when the rank has ended, or nothing comes for the group's time limit.
    """
    size = torch.empty(1, dtype=torch.int64)
    distributed.recv(size, rank, group=group)
    rest = torch.empty(int(size), dtype=torch.uint8)
    distributed.recv(rest, rank, group=group)
    unpickler = _Unpickler(io.BytesIO(rest.numpy().tobytes()))
    value = unpickler.load()
    for tensor in _worth_sending(unpickler.tensors):
        distributed.recv(tensor, rank, group=group)
    return value


def _worth_sending(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [tensor for tensor in tensors if tensor.numel()]
