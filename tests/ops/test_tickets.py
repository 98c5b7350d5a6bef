"""Whose tickets a launch takes: its stream's, or, where it is captured, its own."""

from __future__ import annotations

import gc
import threading
import weakref
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

tickets = pytest.importorskip("lacfast.kernels.tickets", reason="Triton is not installed")

DEVICE = torch.device("cuda", 0)


class Stream(SimpleNamespace):
    """A stream by its handle; `waited` counts what the host waited for."""

    cuda_stream: int
    waited = 0

    def synchronize(self) -> None:
        self.waited += 1


@pytest.fixture
def stream(cuda: Any, monkeypatch: pytest.MonkeyPatch) -> Stream:
    """The current stream of a pretended device that has no tickets yet."""
    current = Stream(cuda_stream=11, is_capturing=False)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: current)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: current.is_capturing)
    monkeypatch.setattr(tickets, "_rooms", {})
    monkeypatch.setattr(tickets, "_of_streams", {})
    monkeypatch.setattr(tickets, "_made", [])
    monkeypatch.setattr(tickets, "TICKETS_AT_ONCE", 64)
    return current


def taken(batch: int = 6) -> tuple[int, int]:
    """Start and end in bytes of a launch's tickets, which are 0, aligned and enough."""
    found: Tensor = tickets.tickets_for(batch, DEVICE)
    assert found.dtype == torch.int32
    assert found.device == DEVICE
    assert not found.cpu().any()
    assert found.numel() >= batch
    assert found.data_ptr() % 16 == 0
    return found.data_ptr(), found.data_ptr() + 4 * found.numel()


def are_apart(ranges: list[tuple[int, int]]) -> bool:
    ordered = sorted(ranges)
    return all(before[1] <= after[0] for before, after in pairwise(ordered))


def test_launches_on_one_stream_share_its_tickets(stream: Stream) -> None:
    assert taken(6) == taken(6) == taken(3)
    # The host waits for the first zeros alone.
    assert stream.waited == 1


def test_streams_and_threads_have_tickets_of_their_own(stream: Stream) -> None:
    first = taken()
    stream.cuda_stream = 12
    second = taken()
    found = []
    thread = threading.Thread(target=lambda: found.append(taken()))
    thread.start()
    thread.join()
    assert are_apart([first, second, *found])


def test_more_samples_get_more_tickets(stream: Stream) -> None:
    few = taken(4)
    many = taken(9)
    assert are_apart([few, many])
    # More than there are at once.
    assert taken(100)[0] != many[0]
    assert stream.waited == 2


def test_every_captured_launch_keeps_its_tickets(stream: Stream) -> None:
    eager = taken()
    stream.is_capturing = True
    captured = [taken() for _ in range(3)]
    stream.is_capturing = False
    assert taken() == eager
    assert are_apart([eager, *captured])
    assert stream.waited == 1


def test_a_room_outlives_its_last_ticket_for_the_graphs_that_know_it(stream: Stream) -> None:
    taken()
    stream.is_capturing = True
    taken()
    stream.is_capturing = False
    room = weakref.ref(tickets._rooms[0].tickets)
    taken(100)
    tickets._of_streams.clear()
    gc.collect()
    assert room() is not None
    assert tickets._rooms[0].tickets is not room()


def test_a_capture_without_room_zeroes_tickets_itself(stream: Stream) -> None:
    stream.is_capturing = True
    first = taken()
    assert stream.waited == 0
    stream.is_capturing = False
    eager = taken(60)
    stream.is_capturing = True
    assert are_apart([first, eager, taken()])
    assert stream.waited == 1


def test_other_devices_have_new_zeros_for_every_launch() -> None:
    first, second = (tickets.tickets_for(5, torch.device("cpu")) for _ in range(2))
    first += 1
    assert second.tolist() == [0] * 5
