"""Regional compilation: torch.compile of a model's repeated blocks, one compiled forward for all uses.

Rollout, update, evaluation, anchor and the critic's copies of a block call the same compiled function.
Only `forward` is compiled: hooks run around it in Python, so the critic's taps see every call, and no
module is renamed or wrapped, so checkpoints keep their names.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

RECOMPILE_LIMIT = 128
"""Compiled variants per block class: its shapes in the model, with and without gradient, adapter on and off,
the critic's copy, a batch of one. A UNet's residual blocks alone have more than torch's limit of 8."""


class CompiledForward:
    """What stands in for a block's `forward`; a copy of the block gets its own, so it stays compiled."""

    def __init__(self, block: nn.Module, backend: str, mode: str | None) -> None:
        self.block = block
        self.backend = backend
        self.mode = mode
        self.function = _compiled(type(block).forward, backend, mode)
        self.__signature__ = inspect.signature(block.forward)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        _mark_batch(args, kwargs)
        return self.function(self.block, *args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> CompiledForward:
        copied = copy.copy(self)
        # deepcopy has already entered the block's copy, whose attribute this is.
        copied.block = copy.deepcopy(self.block, memo)
        return copied


@functools.cache
def _compiled(function: Callable[..., Any], backend: str, mode: str | None) -> Callable[..., Any]:
    compiled: Callable[..., Any] = torch.compile(function, fullgraph=True, backend=backend, mode=mode)
    return compiled


def _mark_batch(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Make the batch size of all arguments symbolic, and no other size.

    One kernel for all batch sizes: no recompilation for a tail, and the same bits in rollout and update.
    """
    tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor) and value.ndim > 0]
    for tensor in tensors:
        if len(tensor) == len(tensors[0]):
            torch._dynamo.maybe_mark_dynamic(tensor, 0)


def compile_blocks(
    modules: Iterable[nn.Module],
    class_names: tuple[str, ...],
    *,
    backend: str = "inductor",
    mode: str | None = None,
) -> int:
    """Compile the forward of every module of the named classes; returns how many there are.

    Compilation itself happens at the first call of each variant; one beyond RECOMPILE_LIMIT raises.

    Args:
        modules: to search; those that are compiled already are left alone.
        class_names: of the blocks that a model repeats.
        backend: of torch.compile.
        mode: of torch.compile.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, RECOMPILE_LIMIT)
    blocks = [block for root in modules for block in root.modules() if type(block).__name__ in class_names]
    for block in blocks:
        if not isinstance(block.forward, CompiledForward):
            block.forward = CompiledForward(block, backend, mode)
    return len(blocks)
