"""normal_noise in C++."""

from __future__ import annotations

import torch
from torch import Tensor

from lacfast import _C


def normal_noise(steps: Tensor, seed: Tensor, sample_ids: Tensor, out: Tensor) -> None:
    rows = steps.shape[0]
    elements = out.numel() // rows
    threads = torch.get_num_threads()
    _C.normal_noise(
        rows, elements, steps.data_ptr(), seed.data_ptr(), sample_ids.data_ptr(), out.data_ptr(), threads
    )
