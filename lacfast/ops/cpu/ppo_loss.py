"""log_ratio and ppo_loss in C++."""

from __future__ import annotations

import torch
from torch import Tensor

from lacfast import _C
from lacfast.ops.cpu.addresses import DTYPE_CODES, address, code


def _ratio_arguments(
    model_output: Tensor,
    old_model_output: Tensor,
    reference_output: Tensor | None,
    coefficients: Tensor,
    steps: Tensor,
    noise: Tensor | None,
    seed: Tensor | None,
    sample_ids: Tensor | None,
    scale: float,
) -> tuple[int, int, int, int, int, int, int, int, int, int, int, int, int, float]:
    rows = steps.shape[0]
    return (
        rows,
        model_output.numel() // rows,
        model_output.data_ptr(),
        old_model_output.data_ptr(),
        address(reference_output),
        DTYPE_CODES[model_output.dtype],
        coefficients.data_ptr(),
        coefficients.shape[0],
        steps.data_ptr(),
        address(noise),
        code(noise),
        address(seed),
        address(sample_ids),
        scale,
    )


def log_ratio_forward(
    model_output: Tensor,
    old_model_output: Tensor,
    reference_output: Tensor | None,
    coefficients: Tensor,
    steps: Tensor,
    noise: Tensor | None,
    seed: Tensor | None,
    sample_ids: Tensor | None,
    scale: float,
    terms: Tensor,
) -> None:
    ratio = _ratio_arguments(
        model_output, old_model_output, reference_output, coefficients, steps, noise, seed, sample_ids, scale
    )
    _C.log_ratio_forward(*ratio, terms.data_ptr(), torch.get_num_threads())


def ppo_loss_forward(
    model_output: Tensor,
    old_model_output: Tensor,
    reference_output: Tensor | None,
    advantages: Tensor,
    weights: Tensor | None,
    coefficients: Tensor,
    steps: Tensor,
    noise: Tensor | None,
    seed: Tensor | None,
    sample_ids: Tensor | None,
    scale: float,
    clip_range: float,
    kl_weight: float,
    rows: Tensor,
) -> None:
    ratio = _ratio_arguments(
        model_output, old_model_output, reference_output, coefficients, steps, noise, seed, sample_ids, scale
    )
    _C.ppo_loss_forward(
        *ratio,
        advantages.data_ptr(),
        address(weights),
        clip_range,
        kl_weight,
        rows.data_ptr(),
        torch.get_num_threads(),
    )


def log_ratio_backward(
    model_output: Tensor,
    old_model_output: Tensor,
    reference_output: Tensor | None,
    coefficients: Tensor,
    steps: Tensor,
    noise: Tensor | None,
    seed: Tensor | None,
    sample_ids: Tensor | None,
    scale: float,
    grad_terms: Tensor,
    grad_model_output: Tensor,
) -> None:
    ratio = _ratio_arguments(
        model_output, old_model_output, reference_output, coefficients, steps, noise, seed, sample_ids, scale
    )
    _C.log_ratio_backward(
        *ratio, grad_terms.data_ptr(), grad_model_output.data_ptr(), torch.get_num_threads()
    )
