"""Mixed precision: where float32 weights run in a lower dtype."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


def running_in(dtype: torch.dtype, like: Tensor) -> AbstractContextManager[Any]:
    """Autocast to `dtype` on the device of `like`; nothing for float32."""
    if dtype == torch.float32:
        return nullcontext()
    if like.is_meta:
        return _MetaAutocast(dtype)
    return torch.autocast(like.device.type, dtype=dtype)


class _MetaAutocast(TorchFunctionMode):
    """The casts of torch.autocast that diffusers' models meet, for the meta device, which has no autocast."""

    lowered = (nn.functional.linear, nn.functional.conv2d, nn.functional.scaled_dot_product_attention)
    raised = (nn.functional.layer_norm, nn.functional.group_norm)

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        named = kwargs or {}
        if func in self.lowered or func in self.raised:
            dtype = self.dtype if func in self.lowered else torch.float32
            args = tuple(_cast(value, dtype) for value in args)
            named = {name: _cast(value, dtype) for name, value in named.items()}
        return func(*args, **named)


def _cast(value: Any, dtype: torch.dtype) -> Any:
    is_cast = isinstance(value, Tensor) and value.is_floating_point()
    return value.to(dtype) if is_cast else value
