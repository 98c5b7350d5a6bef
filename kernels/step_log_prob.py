"""The log-probability of a transition that is given, and its gradients.

    log_prob = reduce( -(x' - mu)^2 / (2 std^2) - log std - log(2 pi) / 2 ),   mu = a x + b v
    with r = scale grad (x' - mu) / std^2:   grad x = a r,   grad v = b r,   grad x' = -r

Bytes per element: forward reads x, v and x'; backward reads them again and writes the gradients that are
asked for. Nothing is kept between the two. Eagerly the formula is a dozen launches each way.

The sum over a latent is split by its size alone, and its parts are added in the order of their index by
whichever program ends last (tickets.py): the log-prob does not depend on the batch. std = 0 marks a
deterministic step: log_prob and gradients are 0.
"""

# Constants of a kernel are upper case.
# ruff: noqa: N803

from typing import Any

import triton
import triton.language as tl

from . import compiled, launch
from .gaussian_step import add_parts, mean_log_prob, parts, transition_row
from .philox import block_offsets
from .tickets import give_back, is_last


@triton.jit
def load_block(ptr, offs, mask):
    return tl.load(ptr + offs, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def step_log_prob_kernel(
    sample_ptr, model_output_ptr, prev_sample_ptr, coefficients_ptr, steps_ptr, scale, log_prob_ptr,
    partial_ptr, tickets_ptr, N, num_splits,
    BLOCK_N: tl.constexpr, BLOCKS: tl.constexpr, BLOCK_S: tl.constexpr,
    IS_SHARED_STEP: tl.constexpr, IS_SPLIT: tl.constexpr,
):  # fmt: skip
    i_b = tl.program_id(0) // num_splits
    i_split = tl.program_id(0) % num_splits
    row = i_b.to(tl.int64) * N
    step = tl.load(steps_ptr + (0 if IS_SHARED_STEP else i_b))
    a, b, std, inverse_std = transition_row(coefficients_ptr, step)
    b_squares = tl.zeros((BLOCK_N,), tl.float32)
    for i_block in tl.static_range(BLOCKS):
        offs_n = block_offsets((i_split * BLOCKS + i_block) * BLOCK_N, BLOCK_N)
        mask_n = offs_n < N
        b_mean = a * load_block(sample_ptr + row, offs_n, mask_n)
        b_mean += b * load_block(model_output_ptr + row, offs_n, mask_n)
        # Elements past the end load as 0 everywhere and add nothing.
        b_z = (load_block(prev_sample_ptr + row, offs_n, mask_n) - b_mean) * inverse_std
        b_squares += b_z * b_z
    sum_squares = tl.sum(b_squares, axis=0)
    is_owner = True
    if IS_SPLIT:
        tl.store(partial_ptr + tl.program_id(0), sum_squares)
        is_owner = is_last(tickets_ptr, i_b, num_splits)
    if is_owner:
        if IS_SPLIT:
            sum_squares = add_parts(partial_ptr, i_b, num_splits, BLOCK_S)
            give_back(tickets_ptr, i_b)
        tl.store(log_prob_ptr + i_b, mean_log_prob(sum_squares, std, N, scale))


@triton.jit
def store_gradient(ptr, offs, mask, b_grad, std):
    # A deterministic step has no gradient, whatever lies in its latents.
    tl.store(ptr + offs, tl.where(std > 0, b_grad, 0.0).to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def step_log_prob_backward_kernel(
    sample_ptr, model_output_ptr, prev_sample_ptr, coefficients_ptr, steps_ptr, scale, grad_log_prob_ptr,
    grad_sample_ptr, grad_model_output_ptr, grad_prev_sample_ptr, N, num_splits,
    BLOCK_N: tl.constexpr, BLOCKS: tl.constexpr, IS_SHARED_STEP: tl.constexpr,
    HAS_GRAD_SAMPLE: tl.constexpr, HAS_GRAD_OUTPUT: tl.constexpr, HAS_GRAD_PREV: tl.constexpr,
):  # fmt: skip
    i_b = tl.program_id(0) // num_splits
    i_split = tl.program_id(0) % num_splits
    row = i_b.to(tl.int64) * N
    step = tl.load(steps_ptr + (0 if IS_SHARED_STEP else i_b))
    a, b, std, inverse_std = transition_row(coefficients_ptr, step)
    weight = scale * tl.load(grad_log_prob_ptr + i_b).to(tl.float32) * inverse_std * inverse_std
    for i_block in tl.static_range(BLOCKS):
        offs_n = block_offsets((i_split * BLOCKS + i_block) * BLOCK_N, BLOCK_N)
        mask_n = offs_n < N
        b_mean = a * load_block(sample_ptr + row, offs_n, mask_n)
        b_mean += b * load_block(model_output_ptr + row, offs_n, mask_n)
        b_pull = weight * (load_block(prev_sample_ptr + row, offs_n, mask_n) - b_mean)
        if HAS_GRAD_SAMPLE:
            store_gradient(grad_sample_ptr + row, offs_n, mask_n, a * b_pull, std)
        if HAS_GRAD_OUTPUT:
            store_gradient(grad_model_output_ptr + row, offs_n, mask_n, b * b_pull, std)
        if HAS_GRAD_PREV:
            store_gradient(grad_prev_sample_ptr + row, offs_n, mask_n, -b_pull, std)


def step_log_prob(inputs: Any, outputs: Any) -> None:
    """Fill log_prob (B,) float32; steps is (B,) or (1,), scale is 1 / N for a mean, 1 for a sum."""
    sample = inputs.sample
    batch = sample.shape[0]
    num_elements = sample.numel() // batch
    architecture = launch.architecture_of(sample.device)
    block_n, blocks, num_warps, num_splits = launch.pick_launch("step_log_prob", num_elements, architecture)
    partial, tickets = parts(batch, num_splits, sample.device)
    compiled.run(
        step_log_prob_kernel, (batch * num_splits,),
        *inputs, *outputs, partial, tickets, num_elements, num_splits,
        BLOCK_N=block_n, BLOCKS=blocks, BLOCK_S=triton.next_power_of_2(num_splits),
        IS_SHARED_STEP=inputs.steps.numel() == 1, IS_SPLIT=partial is not None,
        num_warps=num_warps, enable_fp_fusion=False,
    )  # fmt: skip


def step_log_prob_backward(inputs: Any, _: Any, grads: Any, gradients: Any) -> None:
    """Fill the gradients of sample, model_output and prev_sample that are not None."""
    sample = inputs.sample
    batch = sample.shape[0]
    num_elements = sample.numel() // batch
    architecture = launch.architecture_of(sample.device)
    block_n, blocks, num_warps, num_splits = launch.pick_launch(
        "step_log_prob_backward", num_elements, architecture
    )
    compiled.run(
        step_log_prob_backward_kernel, (batch * num_splits,),
        *inputs, grads.log_prob, gradients.sample, gradients.model_output, gradients.prev_sample,
        num_elements, num_splits,
        BLOCK_N=block_n, BLOCKS=blocks, IS_SHARED_STEP=inputs.steps.numel() == 1,
        HAS_GRAD_SAMPLE=gradients.sample is not None, HAS_GRAD_OUTPUT=gradients.model_output is not None,
        HAS_GRAD_PREV=gradients.prev_sample is not None,
        num_warps=num_warps, enable_fp_fusion=False,
    )  # fmt: skip
