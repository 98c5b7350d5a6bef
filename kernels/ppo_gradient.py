"""Gradient of log_ratio's terms and of the PPO loss by the model's output: one read, one write.

    grad v = scale [ g_ratio (b / std) (eps - z) + g_old (b / std) z + 2 g_ref g (v - v_ref) ]
    "ratio_norm": g_ratio b eps in place of the first term;   z = b (v - v_old) / std

g_ratio, g_old and g_ref are the derivatives of the loss by a row's log_ratio, kl_old and kl_ref; see
ppo_loss.py and ppo_rows.py. Bytes per element: reads v and v_old, writes the gradient; v_ref and a given
noise are one read more each. A row without a gradient (masked, clipped, deterministic) is only written. The
forward keeps nothing of latent size for this: a key's noise is drawn again. Eagerly it is a dozen launches.
"""

# Constants of a kernel are upper case.
# ruff: noqa: N803

from typing import Any

import torch
import triton
import triton.language as tl

from . import compiled, launch
from .gaussian_step import transition_row
from .philox import block_offsets, innovation_block, load_key
from .ppo_rows import kl_gain


@triton.jit
def transition_grad_kernel(
    model_output_ptr, old_model_output_ptr, anchor_output_ptr,
    coefficients_ptr, steps_ptr, noise_ptr, seed_ptr, sample_ids_ptr,
    kl_gains_ptr, scale, grad_terms_ptr, grad_loss_ptr, grad_model_output_ptr, N, num_splits,
    BLOCK_N: tl.constexpr, BLOCKS: tl.constexpr, HAS_NOISE: tl.constexpr, IS_NORMALIZED: tl.constexpr,
):  # fmt: skip
    i_b = tl.program_id(0) // num_splits
    i_split = tl.program_id(0) % num_splits
    row = i_b.to(tl.int64) * N
    step = tl.load(steps_ptr + i_b)
    _, b, std, inverse_std = transition_row(coefficients_ptr, step)
    seed, sample_id = load_key(seed_ptr, sample_ids_ptr, i_b, HAS_NOISE)
    gain = b * inverse_std
    if grad_loss_ptr is None:
        # grad_terms (B, 3) by log_ratio, kl_old, kl_ref
        grad_ratio = scale * tl.load(grad_terms_ptr + i_b * 3)
        grad_old = scale * tl.load(grad_terms_ptr + i_b * 3 + 1)
        grad_ref = scale * tl.load(grad_terms_ptr + i_b * 3 + 2)
    else:
        # shares (B, 3): the loss, and its derivatives by log_ratio, kl_ref
        outer = scale * tl.load(grad_loss_ptr)
        grad_ratio = outer * tl.load(grad_terms_ptr + i_b * 3 + 1)
        grad_old = 0.0
        grad_ref = outer * tl.load(grad_terms_ptr + i_b * 3 + 2)
    if IS_NORMALIZED:
        along_noise = grad_ratio * b
        along_old = 0.0
    else:
        along_noise = grad_ratio * gain
        along_old = (grad_old - grad_ratio) * gain * gain
    along_ref = 2.0 * grad_ref * kl_gain(kl_gains_ptr, step, gain)
    has_gradient = (std > 0) & ((along_noise != 0) | (along_old != 0) | (along_ref != 0))
    limit = N * has_gradient.to(tl.int32)
    for i_block in tl.static_range(BLOCKS):
        first = (i_split * BLOCKS + i_block) * BLOCK_N
        offs_n = block_offsets(first, BLOCK_N)
        mask_n = offs_n < limit
        b_v = tl.load(model_output_ptr + row + offs_n, mask=mask_n, other=0.0).to(tl.float32)
        b_v_old = tl.load(old_model_output_ptr + row + offs_n, mask=mask_n, other=0.0).to(tl.float32)
        b_eps = innovation_block(noise_ptr, seed, sample_id, step, row, first, limit, BLOCK_N, HAS_NOISE)
        b_grad = along_noise * b_eps + along_old * (b_v - b_v_old)
        if anchor_output_ptr is not None:
            b_v_ref = tl.load(anchor_output_ptr + row + offs_n, mask=mask_n, other=0.0).to(tl.float32)
            b_grad += along_ref * (b_v - b_v_ref)
        b_grad = tl.where(has_gradient, b_grad, 0.0).to(grad_model_output_ptr.dtype.element_ty)
        tl.store(grad_model_output_ptr + row + offs_n, b_grad, mask=offs_n < N)


def log_ratio_backward(inputs: Any, _: Any, grads: Any, gradients: Any) -> None:
    """Fill the gradient of model_output from those (B, 3) of log_ratio, kl_old, kl_ref."""
    _gradient(inputs, grads.terms, None, gradients.model_output)


def ppo_loss_backward(inputs: Any, outputs: Any, grads: Any, gradients: Any) -> None:
    """Fill the gradient of model_output from the forward's shares (B, 3) and the gradient () of the loss."""
    _gradient(inputs, outputs.shares, grads.loss, gradients.model_output)


def _gradient(
    inputs: Any, grad_terms: torch.Tensor, grad_loss: torch.Tensor | None, grad_model_output: torch.Tensor
) -> None:
    batch = inputs.steps.numel()
    num_elements = grad_model_output.numel() // batch
    architecture = launch.architecture_of(grad_model_output.device)
    block_n, blocks, num_warps, num_splits = launch.pick_launch(
        "ppo_loss_backward", num_elements, architecture
    )
    compiled.run(
        transition_grad_kernel, (batch * num_splits,),
        inputs.model_output, inputs.old_model_output, inputs.anchor_output,
        inputs.coefficients, inputs.steps, inputs.noise, inputs.seed, inputs.sample_ids,
        inputs.kl_gains, inputs.scale, grad_terms, grad_loss, grad_model_output, num_elements, num_splits,
        BLOCK_N=block_n, BLOCKS=blocks, HAS_NOISE=inputs.noise is not None,
        IS_NORMALIZED=inputs.is_normalized, num_warps=num_warps, enable_fp_fusion=False,
    )  # fmt: skip
