"""A capture that fails leaves the device as it was, on a stand-in for what torch has of CUDA."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from refusals import Refusal

from lacfast.config import GraphConfig
from lacfast.runtime import cuda_graph
from lacfast.runtime.cuda_graph import CudaCapture
from lacfast.runtime.failures import FailedError
from lacfast.runtime.graph import GraphRunner, StaticStep


class State:
    """Of a generator: how much was drawn, and whether a capture took it over."""

    def __init__(self, offset: int) -> None:
        self.offset = offset
        self.is_capturing = False


class Generator:
    def __init__(self, state: State) -> None:
        self.state = state

    def clone_state(self) -> Generator:
        return Generator(State(self.state.offset))

    def graphsafe_set_state(self, other: Generator) -> None:
        self.state = other.state

    def draw(self) -> None:
        if self.state.is_capturing:
            raise RuntimeError("Offset increment outside graph capture encountered unexpectedly")
        self.state.offset += 4


class Graph:
    num_bytes = 0

    def reset(self) -> None:
        """There is nothing to free."""


class Stream:
    def __init__(self, device: Any = None) -> None:
        self.device = device

    def wait_stream(self, other: Stream) -> None:
        """There is nothing to wait for."""


@pytest.fixture
def generator(monkeypatch: pytest.MonkeyPatch) -> Generator:
    """The generator of a pretended cuda:0, which a capture that ends in an error leaves as it is in one."""
    generator = Generator(State(offset=12))

    @contextlib.contextmanager
    def graph(*_: Any, **__: Any) -> Iterator[None]:
        generator.state.is_capturing = True
        yield

    @contextlib.contextmanager
    def entered(_: Any) -> Iterator[None]:
        yield

    cuda = torch.cuda
    for name, stand_in in {
        "default_generators": [generator],
        "graph": graph,
        "Stream": Stream,
        "stream": entered,
        "device": entered,
        "current_stream": Stream,
        "graph_pool_handle": lambda: (0, 1),
        "memory_snapshot": list,
    }.items():
        monkeypatch.setattr(cuda, name, stand_in)
    for name in ("_cuda_endAllocateToPool", "_cuda_releasePool"):
        monkeypatch.setattr(torch._C, name, lambda *_: None, raising=False)
    monkeypatch.setattr(cuda_graph, "CudaGraph", Graph)
    monkeypatch.setattr(torch, "rand", lambda *_, **__: generator.draw())
    return generator


def test_a_device_without_an_index_stays_the_one_that_was_current(
    generator: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    capture = CudaCapture(torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    assert capture.device == torch.device("cuda", 1)
    assert capture.stream.device == torch.device("cuda", 1)
    assert CudaCapture(torch.device("cuda", 0)).device == torch.device("cuda", 0)


class Waits:
    """A step that a capture refuses."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def __call__(self) -> None:
        raise self.error


@pytest.mark.parametrize(
    "error", [RuntimeError("it waits"), ValueError("a bug")], ids=lambda error: str(error)
)
def test_the_generator_draws_on_from_where_it_was(generator: Generator, error: Exception) -> None:
    with pytest.raises(type(error), match=str(error)):
        CudaCapture(torch.device("cuda", 0)).capture(Waits(error))
    assert generator.state.offset == 12
    generator.draw()
    assert generator.state.offset == 16


def test_memory_that_ran_out_is_told_where_torch_tells_of_the_capture(generator: Generator) -> None:
    def run() -> None:
        try:
            raise torch.OutOfMemoryError("CUDA out of memory")
        finally:
            # What torch.cuda.graph does when it ends such a capture.
            raise RuntimeError("operation failed due to a previous error during capture")

    with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
        CudaCapture(torch.device("cuda", 0)).capture(run)


def test_a_generator_that_stays_captured_ends_the_run(
    generator: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Generator, "graphsafe_set_state", lambda self, other: None)
    runs: list[int] = []

    def run() -> None:
        runs.append(len(runs))
        if len(runs) == 3:
            raise RuntimeError("it waits")

    runner = GraphRunner(GraphConfig(mode="on", warmup_steps=1), torch.device("cuda", 0))
    refusal = Refusal(
        "torch's generator of cuda:0 refuses to draw",
        cause="A step could not be captured, and this version of torch does not give its generator back.",
        remedy="start the run again with graph.mode='off', it goes on from its checkpoint",
        error=FailedError,
    )
    # To go on eagerly, as after any other failed capture, would fail at the next draw.
    with refusal.raised():
        runner.run(StaticStep("a step", run, list, dict), 2)
    assert not runner.statistics.fallbacks
