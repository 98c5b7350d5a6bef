"""A CUDA device that is pretended: its tensors say cuda:0 and hold their values on the host.

    with pretended_cuda() as waits:
        trainer.train_iteration()
    waits.counts()

What would go wrong on a GPU goes wrong here, at the line that does it:
    an operator or a GPU kernel that is given tensors of both devices               -> DeviceMismatchError
    .numpy() of a tensor of the device                                              -> TypeError, as torch's
    whatever makes the host wait (.item(), copies that are not pinned, masks, ...)  -> a line in the log
    the same within a capture, or in torch.cuda.set_sync_debug_mode("error")        -> RuntimeError
A captured graph replays the operations of its capture on the memory that they had, so what is frozen there is
frozen here. Kernels are those of the CPU, threads share one stream, and memory is without end: neither times
nor races nor what the compiled kernels compute are seen; that they compile and launch is where there is a
recorder (tests/recorded_launches.py). torch.compile cannot trace such tensors: what it is given runs as it
is, and every variant that it would compile is counted as a graph.
"""

from __future__ import annotations

import functools
import importlib
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import count
from types import SimpleNamespace
from typing import Any

import pytest
import torch

# Torch imports its compiler at the first call of some operators, which must not be on the pretended device.
import torch._dynamo
from host_waits import WaitLog
from pretended_tensors import (
    DEVICE,
    CudaTensor,
    DeviceMismatchError,
    DeviceMode,
    Tape,
    log,
    thread,
    to_host,
    values_of,
)
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from lacfast.runtime import cuda_graph, profiling
from lacfast.runtime.trees import leaves

# lacfast.ops has a function of that name.
backend = importlib.import_module("lacfast.ops.backend")


class PretendedGraph:
    """torch.cuda.CUDAGraph."""

    num_bytes = 0

    def __init__(self) -> None:
        self.tape = Tape()
        self.pool: Any = None

    def replay(self) -> None:
        # Into the memory of the capture, whatever mode looks on.
        with torch._C.DisableTorchFunction():
            self.tape.replay()

    def reset(self) -> None:
        _pools[self.pool] -= self.tape.num_bytes
        self.tape = Tape()


@contextmanager
def _graph(graph: PretendedGraph, pool: Any = None, **_: Any) -> Iterator[None]:
    """torch.cuda.graph."""
    assert thread.tape is None, "a capture within a capture"
    thread.tape, log.is_capturing = graph.tape, True
    try:
        yield
    finally:
        thread.tape, log.is_capturing = None, False
        graph.tape.restore()
    graph.pool = pool
    _pools[pool] += graph.tape.num_bytes


_pools: Counter[Any] = Counter()
"""Bytes of the graphs in each pool."""
_handles = count(1)


class _Stream:
    """torch.cuda.Stream; there is but one, whatever it is called."""

    cuda_stream = 0

    def __init__(self, device: Any = None, **_: Any) -> None:
        self.device = DEVICE

    def wait_stream(self, other: _Stream) -> None: ...

    def wait_event(self, event: _Event) -> None: ...

    def record_event(self, event: _Event | None = None) -> _Event:
        return event or _Event()

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        log.add("Stream.synchronize")


class _Event:
    """torch.cuda.Event."""

    def __init__(self, **_: Any) -> None: ...

    def record(self, stream: _Stream | None = None) -> None: ...

    def wait(self, stream: _Stream | None = None) -> None: ...

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        log.add("Event.synchronize")

    def elapsed_time(self, end: _Event) -> float:
        return 1.0


class _Generator:
    """torch's generator of the device, which draws on the host."""

    def clone_state(self) -> _Generator:
        return self

    def graphsafe_set_state(self, state: _Generator) -> None: ...


def _rng_state(device: Any = None) -> Tensor:
    if thread.tape is not None:
        raise RuntimeError("Cannot call CUDAGeneratorImpl::current_seed during CUDA graph capture")
    return torch.zeros(16, dtype=torch.uint8)


GIB = 1 << 30


def _torch_cuda() -> dict[str, Any]:
    """What stands in torch.cuda."""
    main = _Stream()
    properties = SimpleNamespace(
        name="a pretended GPU",
        major=9,
        minor=0,
        total_memory=80 * GIB,
        multi_processor_count=132,
        L2_cache_size=50 << 20,
        shared_memory_per_multiprocessor=228 << 10,
    )

    def held(device: Any = None) -> int:
        return GIB + sum(_pools.values())

    def set_mode(mode: str) -> None:
        log.forbidden = "called a synchronizing CUDA operation" if mode == "error" else ""

    def nothing(*_: Any, **__: Any) -> None: ...

    return {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "_initialized": True,
        "_lazy_init": nothing,
        "current_device": lambda: 0,
        "device_count": lambda: 1,
        "get_device_capability": lambda device=None: (9, 0),
        "get_device_name": lambda device=None: properties.name,
        "get_device_properties": lambda device=None: properties,
        "synchronize": lambda device=None: log.add("torch.cuda.synchronize"),
        "set_sync_debug_mode": set_mode,
        "empty_cache": nothing,
        "mem_get_info": lambda device=None: (60 * GIB, 80 * GIB),
        **dict.fromkeys(("memory_allocated", "max_memory_allocated", "memory_reserved"), held),
        "reset_peak_memory_stats": nothing,
        "memory_snapshot": lambda: [
            {"segment_pool_id": pool, "total_size": size} for pool, size in _pools.items() if pool
        ],
        "Stream": _Stream,
        "Event": _Event,
        "current_stream": lambda device=None: main,
        "default_stream": lambda device=None: main,
        "stream": lambda stream: nullcontext(),
        "device": lambda device: nullcontext(),
        "is_current_stream_capturing": lambda: thread.tape is not None,
        "get_rng_state": _rng_state,
        **dict.fromkeys(("set_rng_state", "manual_seed", "manual_seed_all"), nothing),
        "default_generators": (_Generator(),),
        "CUDAGraph": PretendedGraph,
        "graph": _graph,
        "graph_pool_handle": lambda: (0, next(_handles)),
    }


def _with_one_row_of_sums(kernel: Callable[..., None]) -> Callable[..., None]:
    """The CPU's kernel fills one row of the moments, where CUDA's has one for each block."""

    def filled(inputs: Any, outputs: Any, threads: Any) -> None:
        outputs.sums.zero_()
        kernel(inputs, outputs, threads)

    return filled


def _launch(
    launched: Callable[..., None], kernel_of: Callable[..., Any], recorder: Any
) -> Callable[..., None]:
    """lacfast.ops.backend.launch, with the CPU's kernels in place of the GPU's, on the same memory."""

    def launch(chosen: str, name: str, anchor: Tensor, *records: tuple[Any, ...]) -> None:
        if not isinstance(anchor, CudaTensor):
            launched(chosen, name, anchor, *records)
            return
        for record in records:
            for field, value in record._asdict().items():  # type: ignore[attr-defined]
                if isinstance(value, Tensor) and not isinstance(value, CudaTensor):
                    raise DeviceMismatchError(f"the GPU kernel {name} is given {field} on the CPU")
                assert not isinstance(value, Tensor) or value.is_contiguous(), f"{name}: {field}"
        if recorder is not None and chosen == "triton":
            _launch_for_nothing(name, functools.partial(kernel_of("triton", name), *records), recorder)
        host = tree_map_only(CudaTensor, values_of, records)
        arguments = (*host, (torch.get_num_threads(),))
        kernel = kernel_of("cpu", name)
        if name == "advantage_sums":
            kernel = _with_one_row_of_sums(kernel)
        if thread.tape is not None:
            thread.tape.take(kernel, arguments)
        kernel(*arguments)

    return launch


def _launch_for_nothing(name: str, launcher: Callable[[], None], recorder: Any) -> None:
    """What launches an op's Triton kernels, for a driver that runs none; its arguments are looked at."""
    before = len(recorder.launches)
    # A backward pass calls it from C++, where no mode is left.
    with DeviceMode():
        launcher()
    launches = recorder.launches[before:]
    assert launches, f"{name} launches nothing"
    for launch in launches:
        grid, kernel, arguments = launch[:3], launch[4].name, launch[7:]
        assert all(0 < size < 2**31 for size in grid), f"{kernel}: {grid}"
        strangers = [value for value in arguments if isinstance(value, Tensor)]
        if not all(isinstance(value, CudaTensor) for value in strangers):
            raise DeviceMismatchError(f"the GPU kernel {kernel} is launched with tensors of the host")


def _compile(function: Callable[..., Any], **_: Any) -> Callable[..., Any]:
    """torch.compile of what gets batches of any size."""
    variants: set[Any] = set()

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        tensors = leaves(Tensor, (args, kwargs))
        variant = (torch.is_grad_enabled(), *((tensor.dtype, tensor.shape[1:]) for tensor in tensors))
        if variant not in variants:
            variants.add(variant)
            torch._dynamo.utils.counters["stats"]["unique_graphs"] += 1
        return function(*args, **kwargs)

    return run


@contextmanager
def pretended_cuda(recorder: Any = None, *, has_cuda_kernels: bool = True) -> Iterator[WaitLog]:
    """Within the context there is a CUDA device; gives the log of the host's waits for it.

    Args:
        recorder: a LaunchRecorder, for which the Triton kernels are launched too. None: they are not, which
            saves their compilation.
        has_cuda_kernels: those of CUDA C++ are built.
    """
    log.clear()
    _pools.clear()
    caches = [backend.unusable_reason, backend._natural_backend, profiling._default_spans]
    if "lacfast.backbones.compilation" in sys.modules:
        caches.append(sys.modules["lacfast.backbones.compilation"]._compiled)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in _torch_cuda().items():
            patch.setattr(torch.cuda, name, value)
        for name in ("_cuda_endAllocateToPool", "_cuda_releasePool"):
            patch.setattr(torch._C, name, lambda *_: None, raising=False)
        _patch_torch(patch)
        _patch_package(patch, recorder, ("triton", "cuda") if has_cuda_kernels else ("triton",))
        for cached in caches:
            cached.cache_clear()
        try:
            with DeviceMode():
                yield log
        finally:
            for cached in caches:
                cached.cache_clear()


def _patch_torch(patch: pytest.MonkeyPatch) -> None:
    """Where torch asks in C++ which device a tensor is on, and what is of a thread."""
    patch.setattr(torch.__future__, "_overwrite_module_params_on_conversion", True)
    patch.setattr(torch, "compile", _compile)
    autocast, is_enabled = torch.autocast.__init__, torch.is_autocast_enabled

    def entered(self: Any, device_type: str, *args: Any, **kwargs: Any) -> None:
        autocast(self, "cpu" if device_type == "cuda" else device_type, *args, **kwargs)

    def enabled(device_type: str | None = None) -> bool:
        return is_enabled("cpu" if device_type in ("cuda", None) else device_type)  # type: ignore[arg-type]

    patch.setattr(torch.autocast, "__init__", entered)
    patch.setattr(torch, "is_autocast_enabled", enabled)
    grouped = torch.utils._foreach_utils._group_tensors_by_device_and_dtype

    def groups(lists: Sequence[Sequence[Tensor | None]], with_indices: bool = False) -> dict[Any, Any]:
        # Tensors of both devices would lie in groups of their own.
        of_device = any(isinstance(tensor, CudaTensor) for tensors in lists for tensor in tensors)
        found = grouped(lists, with_indices)  # type: ignore[arg-type]
        return {(DEVICE if of_device else device, dtype): group for (device, dtype), group in found.items()}

    for name in ("torch.utils._foreach_utils", "torch.optim.optimizer", "torch.nn.utils.clip_grad"):
        patch.setattr(importlib.import_module(name), "_group_tensors_by_device_and_dtype", groups)
    run, save = threading.Thread.run, torch.save

    def run_in_mode(self: threading.Thread) -> None:
        with DeviceMode():
            run(self)

    def save_values(content: Any, *args: Any, **kwargs: Any) -> None:
        save(tree_map_only(CudaTensor, to_host, content), *args, **kwargs)

    patch.setattr(threading.Thread, "run", run_in_mode)
    patch.setattr(torch, "save", save_values)


def _patch_package(patch: pytest.MonkeyPatch, recorder: Any, usable: Sequence[str]) -> None:
    """Kernels, graphs, and the one place that asks for the exact type of a weight."""
    reason = backend.unusable_reason.__wrapped__
    patch.setattr(backend, "unusable_reason", lambda name: "" if name in usable else reason(name))
    launched = backend.launch
    for name, module in list(sys.modules.items()):
        if name.startswith("lacfast.ops") and getattr(module, "launch", None) is launched:
            patch.setattr(module, "launch", _launch(launched, backend._kernel, recorder))
    if recorder is not None:
        # Triton is not installed everywhere, and takes a second to import.
        from triton.runtime.driver import driver

        from lacfast.kernels import compiled

        patch.setattr(driver, "_active", recorder)
        patch.setattr(compiled, "_compiled", {})
    patch.setattr(cuda_graph, "CudaGraph", PretendedGraph)
    if "lacfast.backbones.lora_linear" in sys.modules:
        patch.setattr(sys.modules["lacfast.backbones.lora_linear"], "type", _type, raising=False)


def _type(value: Any) -> type:
    """A parameter of the device is one for who asks for the exact type."""
    return nn.Parameter if isinstance(value, CudaTensor) and isinstance(value, nn.Parameter) else type(value)
