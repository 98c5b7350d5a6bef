"""Which code runs an op: C++ for CPU tensors, Triton or CUDA C++ for CUDA tensors, else the reference.

CUDA C++ has the sequential ops, advantages and particles. The reference is called as it is. A kernel of the
other backends takes records, of which it fills the last.
"""

from __future__ import annotations

import importlib
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from lacfast.config.checks import unknown

BACKENDS = ("reference", "cpu", "triton", "cuda")
TRITON_MIN_CAPABILITY = (8, 0)


class _Kernel(NamedTuple):
    formats: tuple[str, ...]
    """How C++ reads each of its records."""
    triton: str | None
    """Its module of lacfast.kernels."""
    cuda: bool
    """Whether it exists in CUDA C++."""


_KERNELS: dict[str, _Kernel] = {}
_forced: ContextVar[str | None] = ContextVar("lacfast_backend", default=None)


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Run the ops of this block on one backend, for tests and comparisons.

    Args:
        name: "reference", "cpu", "triton" or "cuda". An op without a kernel there (gae in Triton, the
            others in CUDA C++) runs as if nothing had been asked.

    Raises:
        ValueError: unknown, or not usable on this machine.
    """
    if name not in BACKENDS:
        raise unknown("backend", name, BACKENDS)
    reason = unusable_reason(name)
    if reason and not (name == "triton" and _interpreted()):
        raise ValueError(f"backend {name!r} is not usable here: {reason}")
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)


def forced_backend() -> str | None:
    """The backend that `backend` asks for here, None outside of it."""
    return _forced.get()


def available() -> dict[str, str]:
    """Each backend with "usable" or the reason why it is not."""
    return {name: unusable_reason(name) or "usable" for name in BACKENDS}


@cache
def unusable_reason(name: str) -> str:
    """Empty when backend `name` can run here. Asked once: the answer cannot change within a process."""
    if name == "reference":
        return ""
    if name == "triton":
        if not torch.cuda.is_available():
            return "no CUDA device (TRITON_INTERPRET=1 runs the kernels on the CPU, slowly)"
        capability = torch.cuda.get_device_capability()
        if capability < TRITON_MIN_CAPABILITY:
            had, needed = (".".join(map(str, each)) for each in (capability, TRITON_MIN_CAPABILITY))
            return f"compute capability {had}; the Triton kernels need {needed}, the first with bfloat16"
        return _import_error("triton")
    error = _import_error("lacfast._C")
    if error or name == "cpu":
        return error
    return str(importlib.import_module("lacfast._C").cuda_unusable_reason())


def chosen_for(name: str, tensor: Tensor) -> str:
    """The backend of kernel `name` for tensors of this device and dtype."""
    # Of a CPU's tensor the type of the device takes eight times as long to find.
    return choose(name, "cpu" if tensor.is_cpu else tensor.device.type, tensor.dtype)


def choose(name: str, device_type: str, dtype: torch.dtype) -> str:
    """The backend of kernel `name` for a device and dtype; a compiled graph keeps the choice."""
    forced = _forced.get()
    if forced is not None and _has_kernel(forced, name):
        _require_device(forced, device_type)
        return forced
    return _natural_backend(name, device_type, dtype)


# What torch.compiler.assume_constant_result sets; that decorator imports the compiler, most of the import.
vars(choose)["_dynamo_marked_constant"] = True


@cache
def _natural_backend(name: str, device_type: str, dtype: torch.dtype) -> str:
    # The kernels take no part in a run on meta tensors: the registered op only needs to be called.
    if device_type in ("cpu", "meta"):
        natural = "cpu"
    elif device_type == "cuda":
        natural = "cuda" if _has_kernel("cuda", name) else "triton"
    else:
        return "reference"
    # The Triton kernels compute in float32.
    if natural == "triton" and dtype == torch.float64:
        return "reference"
    reason = unusable_reason(natural)
    if not reason:
        return natural
    message = f"backend {natural!r} is not usable here ({reason}); {name} runs its slower eager reference"
    warnings.warn(message, RuntimeWarning, stacklevel=5)
    return "reference"


def add_kernel(name: str, formats: Sequence[str], *, triton: Sequence[str] = (), cuda: bool = False) -> None:
    """Make a kernel known: its records' formats, the Triton module that has it, whether CUDA C++ does."""
    _KERNELS[name] = _Kernel(tuple(formats), triton[0] if triton else None, cuda)


def launch(chosen: str, name: str, anchor: Tensor, *records: tuple[Any, ...]) -> None:
    """Call kernel `name` of a backend on the device of `anchor`; it fills the last of its records."""
    kernel = _kernel(chosen, name)
    # The last record of a C++ kernel says where it runs: a number of threads, or a stream.
    if chosen == "cpu":
        kernel(*records, (torch.get_num_threads(),))
    elif anchor.is_cuda and anchor.device.index != torch.cuda.current_device():
        with torch.cuda.device(anchor.device):
            launch(chosen, name, anchor, *records)
    elif chosen == "cuda":
        kernel(*records, (current_stream(),))
    else:
        kernel(*records)


def current_stream() -> int:
    """Address of torch's stream on the current device."""
    stream: int = torch.cuda.current_stream().cuda_stream
    return stream


def through_dispatcher(anchor: Tensor) -> bool:
    """Whether the op must be visible to torch (compilation, fake and meta tensors, dispatch modes).

    The registered op costs 15 us a call where a direct call costs 4, so it runs only where somebody looks.
    """
    if torch.compiler.is_compiling() or is_in_torch_dispatch_mode():
        return True
    # Most are plain tensors; isinstance asks the metaclass, which takes longer.
    return anchor.is_meta or (type(anchor) is not Tensor and isinstance(anchor, FakeTensor))


@cache
def _kernel(chosen: str, name: str) -> Callable[..., None]:
    kernel = _KERNELS[name]
    if chosen == "triton":
        launcher: Callable[..., None] = getattr(
            importlib.import_module(f"lacfast.kernels.{kernel.triton}"), name
        )
        return launcher
    return native_kernel(f"{chosen}.{name}", (*kernel.formats, "i"))


def native_kernel(name: str, formats: Sequence[str]) -> Callable[..., None]:
    """A kernel of the extension module, "cpu.gae", that takes records; the last one says where it runs."""
    kernel: Callable[..., None] = extension().kernel(name, formats)
    return kernel


@cache
def extension() -> Any:
    """The module built from csrc/, told how to read a tensor."""
    module = importlib.import_module("lacfast._C")
    module.name_dtypes((torch.float32, torch.bfloat16, torch.float16, torch.float64))
    # torch 2.9 has no exchange of DLPack in C; its tensors are read through Python.
    module.use_dlpack(Tensor, getattr(Tensor, "__dlpack_c_exchange_api__", None))
    return module


@cache
def layout_reader() -> Callable[[tuple[Tensor | None, ...]], bytes | None]:
    """What writes devices, dtypes and shapes of plain tensors, in order in memory, as bytes; else None."""
    return (lambda tensors: None) if _import_error("lacfast._C") else extension().layout


def _has_kernel(chosen: str, name: str) -> bool:
    if chosen == "triton":
        return _KERNELS[name].triton is not None
    return chosen != "cuda" or _KERNELS[name].cuda


def _require_device(forced: str, device_type: str) -> None:
    wanted = {"cpu": ("cpu",), "triton": ("cuda", "cpu") if _interpreted() else ("cuda",), "cuda": ("cuda",)}
    if forced in wanted and device_type not in wanted[forced]:
        raise ValueError(
            f"backend {forced!r} needs tensors on {' or '.join(wanted[forced])}, not {device_type}"
        )


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1" and not _import_error("triton")


@cache
def _import_error(module: str) -> str:
    try:
        importlib.import_module(module)
    except ImportError as error:
        return f"import {module}: {error}"
    return ""
