"""gaussian_step in C++."""

from __future__ import annotations

import torch
from torch import Tensor

from lacfast import _C
from lacfast.ops.cpu.addresses import DTYPE_CODES, address, code


def gaussian_step(
    sample: Tensor,
    model_output: Tensor,
    uncond_output: Tensor | None,
    guidance_scale: Tensor | None,
    coefficients: Tensor,
    steps: Tensor,
    noise: Tensor | None,
    seed: Tensor | None,
    sample_ids: Tensor | None,
    scale: float,
    prev_sample: Tensor,
    log_prob: Tensor,
    guided_output: Tensor | None,
) -> None:
    rows = steps.shape[0]
    _C.gaussian_step(
        rows,
        sample.numel() // rows,
        sample.data_ptr(),
        DTYPE_CODES[sample.dtype],
        model_output.data_ptr(),
        DTYPE_CODES[model_output.dtype],
        address(uncond_output),
        address(guidance_scale),
        coefficients.data_ptr(),
        coefficients.shape[0],
        steps.data_ptr(),
        address(noise),
        code(noise),
        address(seed),
        address(sample_ids),
        scale,
        prev_sample.data_ptr(),
        log_prob.data_ptr(),
        address(guided_output),
        torch.get_num_threads(),
    )
