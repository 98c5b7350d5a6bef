"""step_log_prob in C++, forward and backward."""

from __future__ import annotations

import torch
from torch import Tensor

from lacfast import _C
from lacfast.ops.cpu.addresses import DTYPE_CODES, address


def step_log_prob(
    sample: Tensor,
    model_output: Tensor,
    prev_sample: Tensor,
    coefficients: Tensor,
    steps: Tensor,
    scale: float,
    log_prob: Tensor,
) -> None:
    _C.step_log_prob(
        *_transition(sample, model_output, prev_sample, coefficients, steps),
        scale,
        log_prob.data_ptr(),
        torch.get_num_threads(),
    )


def step_log_prob_backward(
    sample: Tensor,
    model_output: Tensor,
    prev_sample: Tensor,
    coefficients: Tensor,
    steps: Tensor,
    scale: float,
    grad_log_prob: Tensor,
    grad_sample: Tensor | None,
    grad_model_output: Tensor | None,
    grad_prev_sample: Tensor | None,
) -> None:
    _C.step_log_prob_backward(
        *_transition(sample, model_output, prev_sample, coefficients, steps),
        scale,
        grad_log_prob.data_ptr(),
        address(grad_sample),
        address(grad_model_output),
        address(grad_prev_sample),
        torch.get_num_threads(),
    )


def _transition(
    sample: Tensor, model_output: Tensor, prev_sample: Tensor, coefficients: Tensor, steps: Tensor
) -> tuple[int, int, int, int, int, int, int, int, int, int, int, bool]:
    rows = sample.shape[0]
    return (
        rows,
        sample.numel() // rows,
        sample.data_ptr(),
        DTYPE_CODES[sample.dtype],
        model_output.data_ptr(),
        DTYPE_CODES[model_output.dtype],
        prev_sample.data_ptr(),
        DTYPE_CODES[prev_sample.dtype],
        coefficients.data_ptr(),
        coefficients.shape[0],
        steps.data_ptr(),
        steps.shape[0] == 1,
    )
