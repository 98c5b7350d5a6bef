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
    log_prob: Tensor | None,
    guided_output: Tensor | None,
    latents: Tensor | None = None,
    model_outputs: Tensor | None = None,
    log_probs: Tensor | None = None,
) -> None:
    rows = sample.shape[0]
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
        steps.shape[0] == 1,
        address(noise),
        code(noise),
        address(seed),
        address(sample_ids),
        scale,
        prev_sample.data_ptr(),
        address(log_prob),
        address(guided_output),
        address(latents),
        code(latents),
        address(model_outputs),
        code(model_outputs),
        address(log_probs),
        torch.get_num_threads(),
    )
