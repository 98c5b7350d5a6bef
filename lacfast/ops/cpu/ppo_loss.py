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
    coefficients: Tensor,
    steps: Tensor,
    noise: Tensor | None,
    seed: Tensor | None,
    sample_ids: Tensor | None,
    advantages: Tensor,
    weights: Tensor | None,
    step_weights: Tensor | None,
    mask: Tensor | None,
    kl_gains: Tensor | None,
    scale: float,
    is_normalized: bool,
    clip_low: float,
    clip_high: float,
    dual_clip: float,
    kl_threshold: float,
    kl_weight: float,
    loss: Tensor,
    rows: Tensor,
    step_sums: Tensor,
    shares: Tensor,
) -> None:
    ratio = _ratio_arguments(
        model_output, old_model_output, reference_output, coefficients, steps, noise, seed, sample_ids, scale
    )
    _C.ppo_loss_forward(
        *ratio,
        address(kl_gains),
        is_normalized,
        advantages.data_ptr(),
        address(weights),
        address(step_weights),
        address(mask),
        clip_low,
        clip_high,
        dual_clip,
        kl_threshold,
        kl_weight,
        loss.data_ptr(),
        rows.data_ptr(),
        step_sums.data_ptr(),
        shares.data_ptr(),
        torch.get_num_threads(),
    )


def ppo_loss_backward(
    model_output: Tensor,
    old_model_output: Tensor,
    reference_output: Tensor | None,
    coefficients: Tensor,
    steps: Tensor,
    noise: Tensor | None,
    seed: Tensor | None,
    sample_ids: Tensor | None,
    kl_gains: Tensor | None,
    scale: float,
    is_normalized: bool,
    shares: Tensor,
    grad_loss: Tensor,
    grad_model_output: Tensor,
) -> None:
    ratio = _ratio_arguments(
        model_output, old_model_output, reference_output, coefficients, steps, noise, seed, sample_ids, scale
    )
    _C.ppo_loss_backward(
        *ratio,
        address(kl_gains),
        is_normalized,
        shares.data_ptr(),
        grad_loss.data_ptr(),
        grad_model_output.data_ptr(),
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
