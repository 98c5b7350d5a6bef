"""What operations give on the meta device, asked of torch once for each kind of arguments."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

Answer: TypeAlias = Callable[[tuple[Any, ...], dict[str, Any]], Any]
"""Arguments and named ones -> what an operation gives."""

Layout: TypeAlias = tuple[torch.Size, tuple[int, ...], torch.dtype]
"""Shape, strides and dtype."""

_ANSWERS: dict[Any, Answer] = {}
"""Answers of torch, by the operation and what it was given."""


class _NotKnownError(Exception):
    """An argument of which a result may depend by more than its layout."""


def on_meta(func: Any, args: tuple[Any, ...], named: dict[str, Any]) -> Any:
    """What an operation gives, as `func(*args, **named)` in a `__torch_dispatch__` would.

    Most of torch's kernels for the meta device are written in Python: one takes longer than all else that is
    done for an operation there. The blocks of a model ask the same of them, so what was given is made again.
    """
    if not _is_plain(func):
        return func(*args, **named)
    try:
        taken, by_name = (
            tuple(map(_described, args)),
            {name: _described(each) for name, each in named.items()},
        )
    except _NotKnownError:
        return func(*args, **named)
    key = func, taken, tuple(by_name.items())
    if key in _ANSWERS:
        return _ANSWERS[key](args, named)
    output = func(*args, **named)
    _ANSWERS[key] = (
        _returning(output, args, named, taken, by_name)
        or _making(output, args, named)
        or (lambda args, named: func(*args, **named))
    )
    return output


@cache
def _is_plain(func: Any) -> bool:
    """Whether an operation takes tensors and gives new ones, or the one that it writes to."""
    arguments, returns = func._schema.arguments, func._schema.returns
    is_of_tensors = any("Tensor" in str(argument.type) for argument in arguments) and bool(returns)
    if not is_of_tensors or any(str(each.type) != "Tensor" for each in returns):
        return False
    aliases = [each.alias_info for each in (*arguments, *returns) if each.alias_info is not None]
    writes = len(returns) == 1 and len(aliases) == 2 and all(alias.is_write for alias in aliases)
    return not aliases or (writes and torch.Tag.inplace_view not in func.tags)


def _described(value: Any) -> Any:
    """What a result depends on, which can be hashed."""
    if isinstance(value, Tensor):
        if not value.is_meta or type(value) not in (Tensor, nn.Parameter) or value.is_complex():
            raise _NotKnownError
        return value.shape, value.stride(), value.dtype
    if isinstance(value, list | tuple):
        return tuple(map(_described, value))
    # 1 == 1.0 == True, which give other dtypes.
    return type(value), value


def _returning(
    output: Any, args: tuple[Any, ...], named: dict[str, Any], taken: tuple[Any, ...], by_name: dict[str, Any]
) -> Answer | None:
    """The answer that is an argument which was written to, unless that has changed its layout."""
    for place, value in enumerate(args):
        if value is output and _described(output) == taken[place]:
            return lambda args, named: args[place]
    for name, value in named.items():
        if value is output and _described(output) == by_name[name]:
            return lambda args, named: named[name]
    return None


def _making(output: Any, args: tuple[Any, ...], named: dict[str, Any]) -> Answer | None:
    """The answer that is new tensors, unless their layouts do not tell all of them."""
    theirs = {id(each.untyped_storage()) for each in (*args, *named.values()) if isinstance(each, Tensor)}
    layouts: list[Layout | None] = []
    for tensor in output if isinstance(output, tuple) else (output,):
        # A gradient that is not asked for.
        if tensor is None:
            layouts.append(None)
            continue
        layout = tensor.shape, tensor.stride(), tensor.dtype
        layouts.append(layout)
        is_own = tensor.is_meta and id(tensor.untyped_storage()) not in theirs and not tensor.is_complex()
        if not is_own or tensor.untyped_storage().nbytes() != _made(layout).untyped_storage().nbytes():
            return None
    if isinstance(output, tuple):
        return lambda args, named: tuple(each and _made(each) for each in layouts)
    return lambda args, named: _made(layout)


def _made(layout: Layout) -> Tensor:
    shape, strides, dtype = layout
    return torch.empty_strided(shape, strides, dtype=dtype, device="meta")
