"""The C++ kernels: tensors as addresses. No checks here; arguments are those that the ops have checked."""

from __future__ import annotations

import torch
from torch import Tensor

from lacfast import _C

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _code(tensor: Tensor | None) -> int:
    return 0 if tensor is None else DTYPE_CODES[tensor.dtype]


def normal_noise(steps: Tensor, seed: Tensor, sample_ids: Tensor, out: Tensor) -> None:
    rows = steps.shape[0]
    elements = out.numel() // rows
    threads = torch.get_num_threads()
    _C.normal_noise(
        rows, elements, steps.data_ptr(), seed.data_ptr(), sample_ids.data_ptr(), out.data_ptr(), threads
    )


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
        _address(uncond_output),
        _address(guidance_scale),
        coefficients.data_ptr(),
        coefficients.shape[0],
        steps.data_ptr(),
        _address(noise),
        _code(noise),
        _address(seed),
        _address(sample_ids),
        scale,
        prev_sample.data_ptr(),
        log_prob.data_ptr(),
        _address(guided_output),
        torch.get_num_threads(),
    )


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
        _address(reference_output),
        DTYPE_CODES[model_output.dtype],
        coefficients.data_ptr(),
        coefficients.shape[0],
        steps.data_ptr(),
        _address(noise),
        _code(noise),
        _address(seed),
        _address(sample_ids),
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
        _address(weights),
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


def gae_arguments(
    first_input: Tensor,
    second_input: Tensor,
    gamma: float,
    gae_lambda: float,
    value_lambda: float,
    first_output: Tensor,
    second_output: Tensor,
) -> tuple[int, int, int, int, float, float, float, int, int, int, int]:
    """What the C++ and the CUDA bindings of gae and its backward take, in their order."""
    rows, steps, heads = first_input.shape
    return (
        rows,
        steps,
        heads,
        DTYPE_CODES[first_input.dtype],
        gamma,
        gae_lambda,
        value_lambda,
        first_input.data_ptr(),
        second_input.data_ptr(),
        first_output.data_ptr(),
        second_output.data_ptr(),
    )


def gae(
    rewards: Tensor,
    values: Tensor,
    gamma: float,
    gae_lambda: float,
    value_lambda: float,
    advantages: Tensor,
    returns: Tensor,
) -> None:
    _C.gae(*gae_arguments(rewards, values, gamma, gae_lambda, value_lambda, advantages, returns))


def gae_backward(
    grad_advantages: Tensor,
    grad_returns: Tensor,
    gamma: float,
    gae_lambda: float,
    value_lambda: float,
    grad_rewards: Tensor,
    grad_values: Tensor,
) -> None:
    _C.gae_backward(
        *gae_arguments(
            grad_advantages, grad_returns, gamma, gae_lambda, value_lambda, grad_rewards, grad_values
        )
    )
