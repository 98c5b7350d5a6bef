"""One denoising step, its noise, its guidance and the log-probability of where it landed, in one read.

    v  = v_uncond + guidance_scale (v_cond - v_uncond)      stored in the model's dtype, and used as stored
    x' = a x + b v + std eps                                stored in the sample's dtype
    log_prob = reduce( -(x' - mu)^2 / (2 std^2) - log std - log(2 pi) / 2 ),   mu = a x + b v,   x' as stored

Bytes per element: reads x and v, writes x'; with guidance it also reads v_uncond and writes v; a given noise
is one read more. Eagerly the step is some fifty launches, each of which reads and writes the latent.
The log-prob of the stored value needs no second look: the rounded x' is still in a register. With a
trajectory slab x' overwrites x, and slices of the slab get x', v and the log-prob: the step is read on the
device, so a captured graph moves on from slice to slice.

The sum over a latent is split by its size alone, and its parts are added in the order of their index by
whichever program ends last (tickets.py): the log-prob does not depend on the batch. std = 0 marks a
deterministic step: x' = mu, log_prob 0. There is no backward kernel: log_prob treats x' as a constant, and
the gradient of x' is a product with a or b. A step that the table does not have, which only the device can
see, makes x' NaN and leaves the slab as it is.
"""

# Constants of a kernel are upper case.
# ruff: noqa: N803

from typing import Any

import torch
import triton
import triton.language as tl

from . import compiled, launch
from .philox import block_offsets, innovation_block, load_key
from .tickets import give_back, is_last, tickets_for


@triton.jit
def transition_row(coefficients_ptr, step):
    """a, b, std and 1 / std of a step; 1 / std is 0 where the step is deterministic."""
    row_ptr = coefficients_ptr + step * 3
    a = tl.load(row_ptr)
    b = tl.load(row_ptr + 1)
    std = tl.load(row_ptr + 2)
    inverse_std = tl.where(std > 0, 1.0 / tl.where(std > 0, std, 1.0), 0.0)
    return a, b, std, inverse_std


@triton.jit
def checked_row(coefficients_ptr, step, T):
    """transition_row, and whether the table has that step; a is NaN where it has not."""
    is_step = (step >= 0) & (step < T)
    a, b, std, inverse_std = transition_row(coefficients_ptr, tl.where(is_step, step, 0))
    return is_step, tl.where(is_step, a, float("nan")), b, std, inverse_std


@triton.jit
def mean_log_prob(sum_squares, std, N, scale):
    """log_prob from the sum of ((x' - mu) / std)^2 over the N elements; scale is 1 / N or 1."""
    log_std = tl.log(tl.where(std > 0, std, 1.0))
    # 0.9189385 = log(2 pi) / 2
    log_prob = -0.5 * scale * sum_squares - scale * N * (log_std + 0.9189385332046727)
    return tl.where(std > 0, log_prob, 0.0)


@triton.jit
def add_parts(partial_ptr, row, num_splits, BLOCK_S: tl.constexpr):
    """The sum of one row of partial sums (rows, num_splits)."""
    offs_s = tl.arange(0, BLOCK_S)
    row_ptr = partial_ptr + row.to(tl.int64) * num_splits
    return tl.sum(tl.load(row_ptr + offs_s, mask=offs_s < num_splits, other=0.0), axis=0)


@triton.jit
def gaussian_step_kernel(
    sample_ptr, model_output_ptr, uncond_output_ptr, guidance_scale_ptr, coefficients_ptr, steps_ptr,
    noise_ptr, seed_ptr, sample_ids_ptr, scale, prev_sample_ptr, log_prob_ptr, guided_output_ptr,
    latents_ptr, model_outputs_ptr, log_probs_ptr, partial_ptr, tickets_ptr, N, T, num_splits,
    BLOCK_N: tl.constexpr, BLOCKS: tl.constexpr, BLOCK_S: tl.constexpr,
    HAS_GUIDANCE: tl.constexpr, HAS_NOISE: tl.constexpr, HAS_GUIDED_OUTPUT: tl.constexpr,
    HAS_SLAB: tl.constexpr, IS_SHARED_STEP: tl.constexpr, IS_SPLIT: tl.constexpr,
):  # fmt: skip
    i_b = tl.program_id(0) // num_splits
    i_split = tl.program_id(0) % num_splits
    row = i_b.to(tl.int64) * N
    step = tl.load(steps_ptr + (0 if IS_SHARED_STEP else i_b))
    is_step, a, b, std, inverse_std = checked_row(coefficients_ptr, step, T)
    if HAS_SLAB:
        # The slab has no slice for a step beyond the table.
        kept_n = tl.where(is_step, N, 0)
        batch = tl.num_programs(0) // num_splits
        slab_row = (step * batch + i_b) * N
        next_slab_row = slab_row + batch.to(tl.int64) * N
    seed, sample_id = load_key(seed_ptr, sample_ids_ptr, i_b, HAS_NOISE)
    if HAS_GUIDANCE:
        guidance_scale = tl.load(guidance_scale_ptr)
    b_squares = tl.zeros((BLOCK_N,), tl.float32)
    for i_block in tl.static_range(BLOCKS):
        first = (i_split * BLOCKS + i_block) * BLOCK_N
        offs_n = block_offsets(first, BLOCK_N)
        mask_n = offs_n < N
        b_sample = tl.load(sample_ptr + row + offs_n, mask=mask_n, other=0.0).to(tl.float32)
        b_v = tl.load(model_output_ptr + row + offs_n, mask=mask_n, other=0.0).to(tl.float32)
        if HAS_GUIDANCE:
            b_uncond = tl.load(uncond_output_ptr + row + offs_n, mask=mask_n, other=0.0).to(tl.float32)
            b_guided = b_uncond + guidance_scale * (b_v - b_uncond)
            b_rounded_v = b_guided.to(model_output_ptr.dtype.element_ty)
            if HAS_GUIDED_OUTPUT:
                tl.store(guided_output_ptr + row + offs_n, b_rounded_v, mask=mask_n)
            b_v = b_rounded_v.to(tl.float32)
        if HAS_SLAB:
            b_kept_v = b_v.to(model_outputs_ptr.dtype.element_ty)
            tl.store(model_outputs_ptr + slab_row + offs_n, b_kept_v, mask=offs_n < kept_n)
            b_v = b_kept_v.to(tl.float32)
        b_eps = innovation_block(noise_ptr, seed, sample_id, step, row, first, N, BLOCK_N, HAS_NOISE)
        b_mean = a * b_sample + b * b_v
        # The noise of a deterministic step may be anything.
        b_noise = tl.where(std > 0, std * b_eps, 0.0)
        b_moved = b_mean + b_noise
        if HAS_SLAB:
            b_kept = b_moved.to(latents_ptr.dtype.element_ty)
            tl.store(latents_ptr + next_slab_row + offs_n, b_kept, mask=offs_n < kept_n)
            b_moved = b_kept.to(tl.float32)
        b_stored = b_moved.to(prev_sample_ptr.dtype.element_ty)
        tl.store(prev_sample_ptr + row + offs_n, b_stored, mask=mask_n)
        b_z = (b_stored.to(tl.float32) - b_mean) * inverse_std
        b_squares += tl.where(mask_n, b_z * b_z, 0.0)
    sum_squares = tl.sum(b_squares, axis=0)
    is_owner = True
    if IS_SPLIT:
        tl.store(partial_ptr + tl.program_id(0), sum_squares)
        is_owner = is_last(tickets_ptr, i_b, num_splits)
    if is_owner:
        if IS_SPLIT:
            sum_squares = add_parts(partial_ptr, i_b, num_splits, BLOCK_S)
            give_back(tickets_ptr, i_b)
        log_prob = mean_log_prob(sum_squares, std, N, scale)
        if HAS_SLAB:
            tl.store(log_probs_ptr + step * batch + i_b, log_prob, mask=is_step)
        else:
            tl.store(log_prob_ptr + i_b, log_prob)


def gaussian_step(inputs: Any, outputs: Any) -> None:
    """Fill prev_sample, log_prob and, with guidance, guided_output."""
    _step(inputs, (*outputs, None, None, None))


def gaussian_step_in_place(inputs: Any, slab: Any) -> None:
    """Overwrite the sample, and fill each sample's slices of latents, model_outputs and log_probs."""
    _step(inputs, (inputs.sample, None, None, *slab))


def _step(inputs: Any, filled: tuple[Any, ...]) -> None:
    """Either noise is None or seed and sample_ids are; steps is (B,) or (1,); scale is 1 / N or 1."""
    sample, coefficients = inputs.sample, inputs.coefficients
    _, _, guided_output, _, _, log_probs = filled
    batch = sample.shape[0]
    num_elements = sample.numel() // batch
    architecture = launch.architecture_of(sample.device)
    block_n, blocks, num_warps, num_splits = launch.pick_launch("gaussian_step", num_elements, architecture)
    partial, tickets = parts(batch, num_splits, sample.device)
    compiled.run(
        gaussian_step_kernel, (batch * num_splits,),
        *inputs, *filled, partial, tickets, num_elements, coefficients.shape[0], num_splits,
        BLOCK_N=block_n, BLOCKS=blocks, BLOCK_S=triton.next_power_of_2(num_splits),
        HAS_GUIDANCE=inputs.uncond_output is not None, HAS_NOISE=inputs.noise is not None,
        HAS_GUIDED_OUTPUT=guided_output is not None, HAS_SLAB=log_probs is not None,
        IS_SHARED_STEP=inputs.steps.numel() == 1, IS_SPLIT=partial is not None,
        num_warps=num_warps, enable_fp_fusion=False,
    )  # fmt: skip


def parts(
    batch: int, num_splits: int, device: torch.device, sums: int = 1
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Room for the `sums` of every part of every latent, and tickets; None where a latent is one part."""
    if num_splits == 1:
        return None, None
    partial = torch.empty(batch * sums * num_splits, dtype=torch.float32, device=device)
    return partial, tickets_for(batch, device)
