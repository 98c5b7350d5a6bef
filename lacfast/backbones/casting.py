"""A model's weights in the dtype that it runs in, but for those that its class keeps in float32."""

from __future__ import annotations

from itertools import chain
from typing import Any

import torch
from torch import Tensor


def cast_weights(model: Any, dtype: torch.dtype) -> None:
    """Cast a diffusers model in place, as its `from_pretrained` would have loaded it.

    Args:
        model: `_keep_in_fp32_modules` of its class names what no dtype of 16 bits holds.
        dtype: of all other floating weights and buffers.
    """
    names = set(type(model)._keep_in_fp32_modules or ()) if dtype.itemsize == 2 else set()
    tensors = chain(model.named_parameters(), model.named_buffers())
    kept = {id(tensor) for name, tensor in tensors if names & set(name.split("."))}

    def cast(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor
        return tensor.to(torch.float32 if id(tensor) in kept else dtype)

    # As torch's own `to` does it; diffusers' warns of modules to keep even where there are none.
    model._apply(cast)
