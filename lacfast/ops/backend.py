"""Which code runs an op: C++ for CPU tensors, Triton or CUDA C++ for CUDA tensors, else the reference.

CUDA C++ has the sequential ops, advantages and particles. The reference is called as it is. The other
backends have functions of the same names that fill preallocated outputs.
"""

from __future__ import annotations

import importlib
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

BACKENDS = ("reference", "cpu", "triton", "cuda")

_MODULES = {"cpu": "lacfast.ops.cpu", "cuda": "lacfast.ops.cuda"}
_TRITON_MODULES = {
    "normal_noise": "lacfast.kernels.philox",
    "gaussian_step": "lacfast.kernels.gaussian_step",
    "step_log_prob": "lacfast.kernels.step_log_prob",
    "step_log_prob_backward": "lacfast.kernels.step_log_prob",
    "log_ratio_forward": "lacfast.kernels.ppo_loss",
    "log_ratio_backward": "lacfast.kernels.ppo_gradient",
    "ppo_loss_forward": "lacfast.kernels.ppo_loss",
    "ppo_loss_backward": "lacfast.kernels.ppo_gradient",
    "value_pool_forward": "lacfast.kernels.value_pool",
    "value_pool_backward": "lacfast.kernels.value_pool_backward",
}

_CUDA_KERNELS = (
    "gae",
    "gae_backward",
    "normalized_advantages",
    "advantage_sums",
    "advantage_apply",
    "effective_sample_size",
    "systematic_resample",
)

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
        raise ValueError(f"unknown backend {name!r}; known: {', '.join(BACKENDS)}")
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
        return _import_error("triton")
    error = _import_error("lacfast._C")
    if error or name == "cpu":
        return error
    return str(importlib.import_module("lacfast._C").cuda_unusable_reason())


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def choose(name: str, device_type: str, dtype: torch.dtype) -> str:
    """The backend of kernel `name` for a device and dtype; a compiled graph keeps the choice."""
    forced = _forced.get()
    if forced is not None and _has_kernel(forced, name):
        _require_device(forced, device_type)
        return forced
    return _natural_backend(name, device_type, dtype)


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
    warnings.warn(message, RuntimeWarning, stacklevel=4)
    return "reference"


def launch(chosen: str, name: str, anchor: Tensor, *arguments: Any) -> None:
    """Call kernel `name` of a backend on the device of `anchor`; it fills its last arguments."""
    kernel = _kernel(chosen, name)
    if anchor.is_cuda and anchor.device.index != torch.cuda.current_device():
        with torch.cuda.device(anchor.device):
            kernel(*arguments)
    else:
        kernel(*arguments)


def through_dispatcher(anchor: Tensor) -> bool:
    """Whether the op must be visible to torch (compilation, fake and meta tensors, dispatch modes).

    The registered op costs 15 us a call where a direct call costs 4, so it runs only where somebody looks.
    """
    if torch.compiler.is_compiling():
        return True
    return is_in_torch_dispatch_mode() or isinstance(anchor, FakeTensor) or anchor.is_meta


@cache
def _kernel(chosen: str, name: str) -> Callable[..., None]:
    module = _TRITON_MODULES[name] if chosen == "triton" else _MODULES[chosen]
    kernel: Callable[..., None] = getattr(importlib.import_module(module), name)
    return kernel


def _has_kernel(chosen: str, name: str) -> bool:
    if chosen == "triton":
        return name in _TRITON_MODULES
    return chosen != "cuda" or name in _CUDA_KERNELS


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
