"""Where a kernel is put: torch's current stream of the tensor's device."""

from __future__ import annotations

import torch
from torch import Tensor


def current_stream(tensor: Tensor) -> int:
    stream: int = torch.cuda.current_stream(tensor.device).cuda_stream
    return stream
