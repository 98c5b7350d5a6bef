"""A model's weights in the dtype that it runs in, but for those that its class keeps in float32."""

from __future__ import annotations

from itertools import chain
from typing import Any

import torch


def cast_weights(model: Any, dtype: torch.dtype) -> None:
    """Cast a diffusers model in place, as its `from_pretrained` would have loaded it.

    Args:
        model: `_keep_in_fp32_modules` of its class names what no dtype of 16 bits holds.
        dtype: of all other floating weights and buffers.
    """
    kept = set(type(model)._keep_in_fp32_modules or ()) if dtype.itemsize == 2 else set()
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(torch.float32 if kept & set(name.split(".")) else dtype)
