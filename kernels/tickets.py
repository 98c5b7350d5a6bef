"""Tickets: whichever program of a sample ends last adds up what all of them stored, in the same launch.

The sum of a sample that several programs share would otherwise take a second launch. Every program stores its
part and takes a ticket of the sample. Whoever gets the last one finds all parts written and adds them in the
order of their index, so that the sum does not depend on who that was.

Order. Taking a ticket is one addition by one thread, which releases what that thread stored and acquires what
earlier takers released (PTX ISA, memory consistency model, at the scope of the GPU). A part is one number,
stored by the same thread; what the program reads afterwards it reads behind a barrier.

Owners. The last program sets the count back to 0 for the next launch, so launches that may overlap must not
share tickets. Those of one stream never overlap, and share the stream's. A captured launch has tickets of its
own for good: its graph may be replayed on any stream beside any other work, but never beside itself, since
CUDA orders replays of one graph. A fault within a launch ends its CUDA context and the tickets with it. A
stream made outside of torch must not be destroyed while launches on it go on: its handle may be given again.
"""

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
import triton
import triton.language as tl

TICKETS_AT_ONCE = 1 << 16
"""256 KiB: a thousand captured launches of 64 samples."""


@triton.jit
def is_last(tickets_ptr, i_b, num_splits):
    """Take a ticket of a sample, whose part the program has stored; whether all parts are there."""
    return tl.atomic_add(tickets_ptr + i_b, 1, sem="acq_rel", scope="gpu") == num_splits - 1


@triton.jit
def give_back(tickets_ptr, i_b):
    """Ready a sample's tickets for the next launch, which the last program alone may do."""
    tl.store(tickets_ptr + i_b, 0)


class _Room(NamedTuple):
    """Tickets of a device; those from `used` on have no owner yet."""

    tickets: torch.Tensor
    used: int


_made: list[torch.Tensor] = []
"""Every room, for good: a graph knows the addresses of its tickets and holds no tensor."""
_rooms: dict[int, _Room] = {}
_of_streams: dict[tuple[int, int, int], torch.Tensor] = {}
"""(device, stream, thread) -> tickets; cudaStreamPerThread is one handle for a stream of every thread."""
_lock = threading.Lock()


def tickets_for(batch: int, device: torch.device) -> torch.Tensor:
    """At least `batch` int32 zeros, for one launch on the current stream of a tensor's device."""
    if device.type != "cuda":
        return torch.zeros(batch, dtype=torch.int32, device=device)
    if torch.cuda.is_current_stream_capturing():
        found = _unowned(batch, device.index)
        # A graph that found no room sets its tickets to 0 itself: one node more.
        return torch.zeros(batch, dtype=torch.int32, device=device) if found is None else found
    key = device.index, torch.cuda.current_stream(device).cuda_stream, threading.get_ident()
    found = _of_streams.get(key)
    while found is None or found.numel() < batch:
        found = _unowned(batch, device.index)
        if found is None:
            _make_room(batch, device)
        else:
            _of_streams[key] = found
    return found


def _unowned(batch: int, index: int) -> torch.Tensor | None:
    """Tickets that nobody has yet; None where there is no room."""
    # A compiled kernel is told whether a pointer is a multiple of 16 bytes.
    count = -(-batch // 4) * 4
    with _lock:
        room = _rooms.get(index)
        if room is None or room.used + count > room.tickets.numel():
            return None
        _rooms[index] = _Room(room.tickets, room.used + count)
    return room.tickets[room.used : room.used + count]


def _make_room(batch: int, device: torch.device) -> None:
    # A pool, as of torch.compile's graphs, takes a thread's allocations and must hold none that outlives it.
    with ThreadPoolExecutor(1) as helper:
        tickets = helper.submit(_zeros, max(TICKETS_AT_ONCE, batch + 3), device).result()
    with _lock:
        _made.append(tickets)
        _rooms[device.index] = _Room(tickets, 0)


def _zeros(count: int, device: torch.device) -> torch.Tensor:
    tickets = torch.zeros(count, dtype=torch.int32, device=device)
    # Other streams use them without waiting for this one.
    torch.cuda.current_stream(device).synchronize()
    return tickets
