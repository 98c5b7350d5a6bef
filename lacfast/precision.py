"""Mixed precision: where float32 weights run in a lower dtype."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


def running_in(dtype: torch.dtype, like: Tensor) -> AbstractContextManager[Any]:
    """Autocast to `dtype` on the device of `like`; nothing for float32, nor on the meta device."""
    if dtype == torch.float32 or like.is_meta:
        return nullcontext()
    return torch.autocast(like.device.type, dtype=dtype)
