"""Kernel times on a GPU: some 200 calls in one CUDA graph, so that no launch and no Python is timed.

Cold: the calls go round over copies of the inputs that exceed the L2 cache together, and every call's outputs
live on until its copy's next turn, so reads and writes go to memory as they do in training. Hot: one copy.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from typing import Any

import torch

from bench.roofline import cache_bytes
from bench.workloads.workload import Call, Inputs, Workload

CALLS = 200
MEMORY_SHARE = 0.25
"""Share of the device's free memory for the copies of the inputs."""


def num_copies(num_bytes: int, cache: int, free: int, *, calls: int = CALLS) -> int:
    """Copies of inputs of `num_bytes` that pass four caches, within the memory and the number of calls."""
    wanted = math.ceil(4 * cache / max(num_bytes, 1))
    affordable = int(MEMORY_SHARE * free / max(num_bytes, 1))
    return max(1, min(wanted, affordable, calls))


def graph_seconds(call: Call, copies: list[Inputs], *, calls: int = CALLS, replays: int = 7) -> float:
    """Median seconds of one call within a graph of `calls` that takes `copies` in turn."""
    alive: list[Any] = [None] * len(copies)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    # Compilation, autotuning and lazy initialisation must not be captured.
    with torch.cuda.stream(side):
        for _ in range(3):
            call(copies[0])
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for index in range(calls):
            slot = index % len(copies)
            alive[slot] = call(copies[slot])
    seconds = [_replay_seconds(graph) for _ in range(replays + 2)][2:]
    return statistics.median(seconds) / calls


def empty_node_seconds(*, calls: int = CALLS, replays: int = 7) -> float:
    """Median seconds of a kernel that does nothing, within a graph of `calls`: no launch takes less."""
    # Triton is there wherever a CUDA device is.
    from bench.empty_kernel import empty_kernel

    def launch(_: Inputs) -> tuple[torch.Tensor, ...]:
        empty_kernel[(1,)](num_warps=1)
        return ()

    return graph_seconds(launch, [{}], calls=calls, replays=replays)


def _replay_seconds(graph: torch.cuda.CUDAGraph) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3


def cold_and_hot(
    workload: Workload,
    *,
    seconds: Callable[[Call, list[Inputs]], float] = graph_seconds,
    cache: int | None = None,
    free: int | None = None,
) -> dict[str, tuple[float, float] | str]:
    """Provider -> (cold, hot) seconds, or why it could not be timed.

    Args:
        workload: on a CUDA device.
        seconds: the timer; tests pass one of their own.
        cache: bytes of the cache to pass. None: the device's L2.
        free: bytes of memory for copies. None: the device's.
    """
    device = next(iter(workload.inputs.values())).device
    cache = cache_bytes(device) if cache is None else cache
    free = torch.cuda.mem_get_info(device)[0] if free is None else free
    copies = [workload.inputs]
    copies += [workload.cloned() for _ in range(num_copies(workload.num_bytes, cache, free) - 1)]
    times: dict[str, tuple[float, float] | str] = {}
    for name, call in workload.providers.items():
        try:
            times[name] = seconds(call, copies), seconds(call, copies[:1])
        except Exception as error:
            # One provider that cannot be captured must not cost the others' times.
            times[name] = f"{type(error).__name__}: {error}".splitlines()[0]
    return times
