"""Tensors as the addresses and dtype codes that the C++ bindings take."""

from __future__ import annotations

import torch
from torch import Tensor

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}


def address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def code(tensor: Tensor | None) -> int:
    return 0 if tensor is None else DTYPE_CODES[tensor.dtype]
