"""Likelihood ratio, both KLs and the PPO loss of a transition, from the innovation form: one read.

    log_ratio = reduce( eps z - z^2 / 2 ),   kl_old = reduce( z^2 / 2 ),   z = b (v - v_old) / std
    kl_ref = reduce( g (v - v_ref)^2 )

The loss of a row, and what follows from rows: ppo_rows.py; the gradient: ppo_gradient.py. Bytes per element:
reads v and v_old; v_ref and a given noise are one read more each. Rows that are masked or deterministic are
not read. Eagerly the form is a dozen launches over float32 copies, several of which autograd keeps.

The sums are split by the latent's size alone, and their parts added in the order of their index by whichever
program ends last (tickets.py): they do not depend on the batch. v = v_old gives z = 0 and so a log_ratio of
exactly 0. std = 0 gives zeros throughout.
"""

# Constants of a kernel are upper case.
# ruff: noqa: N803

from typing import Any

import torch
import triton
import triton.language as tl

from . import compiled, launch
from .gaussian_step import add_parts, parts, transition_row
from .philox import block_offsets, innovation_block, load_key
from .ppo_rows import add_up, store_row
from .tickets import give_back, is_last


@triton.jit
def store_terms(cross, squares, squares_ref, i_b, b, inverse_std, scale, terms_ptr):
    """log_ratio, kl_old, kl_ref of one pair."""
    gain = b * inverse_std
    kl_old = scale * (0.5 * gain * gain * squares)
    tl.store(terms_ptr + i_b * 3, scale * (gain * cross) - kl_old)
    tl.store(terms_ptr + i_b * 3 + 1, kl_old)
    tl.store(terms_ptr + i_b * 3 + 2, scale * (0.5 * gain * gain * squares_ref))


@triton.jit
def transition_sums_kernel(
    model_output_ptr, old_model_output_ptr, anchor_output_ptr,
    coefficients_ptr, steps_ptr, noise_ptr, seed_ptr, sample_ids_ptr, scale,
    advantages_ptr, weights_ptr, step_weights_ptr, mask_ptr, kl_gains_ptr, IS_NORMALIZED: tl.constexpr,
    clip_low, clip_high, dual_clip, kl_threshold, kl_weight, rows_ptr, shares_ptr,
    partial_ptr, tickets_ptr, N, num_splits,
    BLOCK_N: tl.constexpr, BLOCKS: tl.constexpr, BLOCK_S: tl.constexpr,
    HAS_NOISE: tl.constexpr, IS_SPLIT: tl.constexpr,
):  # fmt: skip
    i_b = tl.program_id(0) // num_splits
    i_split = tl.program_id(0) % num_splits
    row = i_b.to(tl.int64) * N
    step = tl.load(steps_ptr + i_b)
    _, b, std, inverse_std = transition_row(coefficients_ptr, step)
    seed, sample_id = load_key(seed_ptr, sample_ids_ptr, i_b, HAS_NOISE)
    is_read = std > 0
    if mask_ptr is not None:
        is_read = is_read & (tl.load(mask_ptr + i_b) != 0)
    # A product keeps N's divisibility, by which loads become vectors.
    limit = N * is_read.to(tl.int32)
    b_cross = tl.zeros((BLOCK_N,), tl.float32)
    b_squares = tl.zeros((BLOCK_N,), tl.float32)
    b_squares_ref = tl.zeros((BLOCK_N,), tl.float32)
    for i_block in tl.static_range(BLOCKS):
        first = (i_split * BLOCKS + i_block) * BLOCK_N
        offs_n = block_offsets(first, BLOCK_N)
        mask_n = offs_n < limit
        # Elements past the end load as 0 everywhere, so they add nothing.
        b_v = tl.load(model_output_ptr + row + offs_n, mask=mask_n, other=0.0).to(tl.float32)
        b_v_old = tl.load(old_model_output_ptr + row + offs_n, mask=mask_n, other=0.0).to(tl.float32)
        b_eps = innovation_block(noise_ptr, seed, sample_id, step, row, first, limit, BLOCK_N, HAS_NOISE)
        b_difference = b_v - b_v_old
        b_cross += b_eps * b_difference
        b_squares += b_difference * b_difference
        if anchor_output_ptr is not None:
            b_v_ref = tl.load(anchor_output_ptr + row + offs_n, mask=mask_n, other=0.0).to(tl.float32)
            b_squares_ref += (b_v - b_v_ref) * (b_v - b_v_ref)
    cross = tl.sum(b_cross, axis=0)
    squares = tl.sum(b_squares, axis=0)
    squares_ref = tl.sum(b_squares_ref, axis=0) if anchor_output_ptr is not None else 0.0
    is_owner = True
    if IS_SPLIT:
        cell_ptr = partial_ptr + i_b.to(tl.int64) * 3 * num_splits + i_split
        tl.store(cell_ptr, cross)
        tl.store(cell_ptr + num_splits, squares)
        tl.store(cell_ptr + 2 * num_splits, squares_ref)
        is_owner = is_last(tickets_ptr, i_b, num_splits)
    if is_owner:
        if IS_SPLIT:
            cross = add_parts(partial_ptr, i_b * 3, num_splits, BLOCK_S)
            squares = add_parts(partial_ptr, i_b * 3 + 1, num_splits, BLOCK_S)
            squares_ref = add_parts(partial_ptr, i_b * 3 + 2, num_splits, BLOCK_S)
            give_back(tickets_ptr, i_b)
        if advantages_ptr is None:
            store_terms(cross, squares, squares_ref, i_b, b, inverse_std, scale, rows_ptr)
        else:
            store_row(
                cross, squares, squares_ref, i_b, step, b, std, inverse_std, scale,
                advantages_ptr, weights_ptr, step_weights_ptr, mask_ptr, kl_gains_ptr,
                clip_low, clip_high, dual_clip, kl_threshold, kl_weight, rows_ptr, shares_ptr, IS_NORMALIZED,
            )  # fmt: skip


def log_ratio(inputs: Any, outputs: Any) -> None:
    """Fill terms (B, 3) float32: log_ratio, kl_old, kl_ref."""
    _sums(inputs, outputs.terms, None)


def ppo_loss(inputs: Any, outputs: Any) -> None:
    """Fill loss (), rows (B, 4), step_sums (T, 6) and shares (B, 3), all float32; see ppo_rows.py."""
    _sums(inputs, outputs.rows, outputs.shares)
    add_up(inputs, outputs)


def _sums(inputs: Any, rows: torch.Tensor, shares: torch.Tensor | None) -> None:
    """The pass over the latents: rows (B, 4) and shares (B, 3), or terms (B, 3) in place of both."""
    batch = inputs.steps.numel()
    num_elements = inputs.model_output.numel() // batch
    architecture = launch.architecture_of(rows.device)
    block_n, blocks, num_warps, num_splits = launch.pick_launch("ppo_loss", num_elements, architecture)
    partial, tickets = parts(batch, num_splits, rows.device, sums=3)
    compiled.run(
        transition_sums_kernel, (batch * num_splits,),
        *inputs, rows, shares, partial, tickets, num_elements, num_splits,
        BLOCK_N=block_n, BLOCKS=blocks, BLOCK_S=triton.next_power_of_2(num_splits),
        HAS_NOISE=inputs.noise is not None, IS_SPLIT=partial is not None,
        num_warps=num_warps, enable_fp_fusion=False,
    )  # fmt: skip
