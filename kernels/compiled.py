"""Launches of kernels that are compiled already, without Triton's way to them.

Triton binds every argument of every call to the signature, asks what it is specialised for and makes a key of
it in text: more host time than the rest of an op. Here the key is a tuple of what may change for one kernel,
and the compiled kernel is called directly. A key is as fine as Triton's own: an alignment, a size that is 1
or a multiple of 16, and a constant each have their kernel. Hooks that Triton calls before a launch are called
at a kernel's first launch only.

How a compiled kernel is called is no promise of Triton's. Where a version has it otherwise, every launch is
Triton's own, after one warning.
"""

import warnings
from typing import Any

import torch
import triton
from triton.runtime import JITFunction

ALIGNED = 15
"""Bits that are 0 in a multiple of 16."""
CHANGED = (TypeError, AttributeError, LookupError, NotImplementedError)
"""What calling a compiled kernel raises before anything is launched, if it is called otherwise by now."""
_compiled: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...]]] = {}
"""What is launched -> the compiled kernel, and its constants in the order of its signature."""
_unknown: set[str] = set()
"""What this version of Triton does otherwise: empty, or all launches are Triton's."""


def run(kernel: Any, num_programs: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """kernel[num_programs](*arguments, **options), on the current device, which the arguments are on.

    Args:
        kernel: of @triton.jit.
        num_programs: the grid.
        arguments: a tensor and what else is no constant, as in the signature, which has the constants last.
        options: constants, and how the kernel is compiled; at one place always in the same order.
    """
    # Most arguments are aligned tensors or None, and a call for each of them would take as long as the rest.
    key = (
        id(kernel),
        arguments[0].get_device(),
        *options.values(),
        *[
            value.dtype
            if type(value) is torch.Tensor and not value.data_ptr() & ALIGNED
            else None
            if value is None
            else _specialised(value)
            for value in arguments
        ],
    )
    found = _compiled.get(key)
    if found is not None:
        compiled, values = found
        try:
            compiled[(*num_programs, 1, 1)[:3]](*arguments, *values)
            return
        except CHANGED as error:
            _leave_to_triton(error)
    compiled = kernel[num_programs](*arguments, **options)
    # The interpreter compiles nothing.
    if isinstance(kernel, JITFunction) and not _unknown:
        try:
            constants = kernel.arg_names[len(arguments) :]
            _compiled[key] = compiled, tuple(options[name] for name in constants)
        except CHANGED as error:
            _leave_to_triton(error)


def _leave_to_triton(error: Exception) -> None:
    _compiled.clear()
    _unknown.add(repr(error))
    warnings.warn(
        f"Triton {triton.__version__} launches kernels otherwise than lacfast knows ({error!r}); every "
        "launch takes Triton's own way, which costs the host more time",
        RuntimeWarning,
        stacklevel=4,
    )


def _specialised(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.dtype, value.data_ptr() & ALIGNED
    if type(value) is int:
        return value == 1, value & ALIGNED == 0, value.bit_length() > 31
    # A bool counts by its value in some versions of Triton, a number never does.
    return value if isinstance(value, bool) else type(value)
