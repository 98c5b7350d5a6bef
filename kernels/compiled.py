"""Launches of kernels that are compiled already, without Triton's way to them.

Triton binds every argument of every call to the signature, asks what it is specialised for and makes a key of
it in text: more host time than the rest of an op. Here the key is a tuple of what may change for one kernel,
and the compiled kernel is called directly. A key is as fine as Triton's own: an alignment, a size that is 1
or a multiple of 16, and a constant each have their kernel. Hooks that Triton calls before a launch are called
at a kernel's first launch only.
"""

from typing import Any

import torch
from triton.runtime import JITFunction

ALIGNED = 15
"""Bits that are 0 in a multiple of 16."""
_compiled: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...]]] = {}
"""What is launched -> the compiled kernel, and its constants in the order of its signature."""


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
    if found is None:
        compiled = kernel[num_programs](*arguments, **options)
        # The interpreter compiles nothing.
        if isinstance(kernel, JITFunction):
            constants = kernel.arg_names[len(arguments) :]
            _compiled[key] = compiled, tuple(options[name] for name in constants)
        return
    compiled, values = found
    compiled[(*num_programs, 1, 1)[:3]](*arguments, *values)


def _specialised(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.dtype, value.data_ptr() & ALIGNED
    if type(value) is int:
        return value == 1, value & ALIGNED == 0, value.bit_length() > 31
    # A bool counts by its value in some versions of Triton, a number never does.
    return value if isinstance(value, bool) else type(value)
