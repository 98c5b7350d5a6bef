"""Reading a model's inner activations by module name while it runs."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

from torch import Tensor, nn

from lacfast.critic.trunk import Features

ReadTap = Callable[[dict[str, Any], Any], Features]
"""(arguments by name, output) of a module's forward -> named tensors (B, ...)."""


@dataclass(frozen=True)
class Tap:
    """One module of a model, by its name in `named_modules`, and what to read when it runs."""

    module: str
    read: ReadTap


@contextmanager
def record_taps(model: nn.Module, taps: Sequence[Tap], *, detach: bool = True) -> Iterator[Features]:
    """Within the context, every forward of `model` overwrites the yielded dict with the taps' tensors.

    Raises:
        ValueError: for a module that the model does not have; the message lists those of the same depth.
    """
    features: Features = {}
    handles = []
    try:
        for tap in taps:
            hook = _hook(tap, features, detach)
            handles.append(_tapped(model, tap).register_forward_hook(hook, with_kwargs=True))
        yield features
    finally:
        for handle in handles:
            handle.remove()


def _tapped(model: nn.Module, tap: Tap) -> nn.Module:
    try:
        # A walk over all modules would take longer than a small model's forward.
        return model.get_submodule(tap.module)
    except AttributeError as error:
        depth = tap.module.count(".")
        names = (name for name, _ in model.named_modules() if name)
        known = ", ".join(name for name in names if name.count(".") == depth)
        raise ValueError(
            f"{type(model).__name__} has no module {tap.module!r} to tap; known at that depth: {known}"
        ) from error


def _hook(tap: Tap, features: Features, detach: bool) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        # diffusers passes the same arguments by keyword, or by position under gradient checkpointing.
        arguments = _signature(type(module).forward).bind(module, *args, **kwargs).arguments
        for name, tensor in tap.read(arguments, output).items():
            features[name] = tensor.detach() if detach else tensor

    return hook


@cache
def _signature(forward: Callable[..., Any]) -> inspect.Signature:
    return inspect.signature(forward)


THIRDS = (1 / 3, 2 / 3, 1.0)
"""[paper] blocks 7, 15 and 23 of 24."""


def blocks_at(depth: int, fractions: Sequence[float]) -> list[int]:
    """The last blocks, counted from 0, of the given fractions of `depth`; each once, ascending."""
    # 1/3 and 2/3 are a little less than themselves.
    return sorted({max(math.floor(depth * fraction + 1e-9) - 1, 0) for fraction in fractions})


def feature_map_tokens(feature_map: Tensor) -> Tensor:
    """(B, C, H, W) as tokens (B, H W, C), (B, C, F, H, W) as (B, F H W, C)."""
    return feature_map.flatten(2).mT
