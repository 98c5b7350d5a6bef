"""From the sums of a latent to PPO's loss: a row per (sample, step) pair, then the loss and sums per step.

    log_ratio = scale ( gain cross - gain^2 squares / 2 )      "ratio_norm": scale b cross;     gain = b / std
    kl_old = scale gain^2 squares / 2                          kl_ref = scale g squares_ref
    gain_i = min( rho A, clip(rho, 1 - low, 1 + high) A ),     rho = exp(log_ratio)
    gain_i = max( gain_i, dual_clip A ) where A < 0;           0 where the KL mask drops the pair
    loss = mean_i w_i step_weights[step_i] ( -gain_i + kl_weight kl_ref_i )

with cross = sum eps (v - v_old), squares = sum (v - v_old)^2, squares_ref = sum (v - v_ref)^2, and
g = kl_gains[step], or gain^2 / 2 without that table. Clip: PPO (arXiv 1707.06347, eq. 7); dual clip: arXiv
1912.09729; KL mask: Flow-DPPO (arXiv 2606.11025). A few numbers per pair: what counts here is the number of
launches, so all of the statistics share one with the loss. Every sum has one order.
"""

# Constants of a kernel are upper case.
# ruff: noqa: N803

from typing import Any

import triton
import triton.language as tl

from . import compiled

# One row per thread: a row's columns lie too far apart for wider loads.
BLOCK_R = 128
TOTAL_WARPS = 4


@triton.jit
def expm1(x):
    """exp(x) - 1 without the cancellation that costs a clip range of 1e-5 its last two digits."""
    series = x * (1.0 + x * (0.5 + x * (0.16666667 + x * (0.041666667 + x * 0.0083333333))))
    return tl.where(tl.abs(x) < 0.1, series, tl.exp(x) - 1.0)


@triton.jit
def surrogate_gain(log_ratio, kl_old, advantage, clip_low, clip_high, dual_clip, kl_threshold):
    """Gain, its derivative by log_ratio, and the side on which a bound holds the ratio: -1, +1, else 0."""
    # In terms of rho - 1, so that the clip is decided on digits that exist. All is false for NaN.
    excess = expm1(log_ratio)
    is_positive = advantage > 0
    is_negative = advantage < 0
    is_high = (excess > clip_high) & is_positive
    is_low = (excess < -clip_low) & is_negative
    is_dual = (excess > dual_clip - 1.0) & is_negative
    is_far = (kl_old >= kl_threshold) & (kl_threshold < float("inf"))
    is_dropped = is_far & (log_ratio * advantage > 0)
    bounded = tl.where(is_high, clip_high, tl.where(is_low, -clip_low, excess))
    bounded = tl.where(is_dual, dual_clip - 1.0, bounded)
    gain = tl.where(is_dropped, 0.0, advantage + bounded * advantage)
    is_held = is_high | is_low | is_dual | is_dropped
    is_from_above = is_high | is_dual | (is_dropped & (log_ratio > 0))
    side = tl.where(is_held, tl.where(is_from_above, 1.0, -1.0), 0.0)
    return gain, tl.where(is_held, 0.0, gain), side


@triton.jit
def kl_gain(kl_gains_ptr, step, gain):
    """g of kl_ref = reduce( g (v - v_ref)^2 )."""
    return 0.5 * gain * gain if kl_gains_ptr is None else tl.load(kl_gains_ptr + step)


@triton.jit
def store_row(
    cross, squares, squares_ref, i_b, step, b, std, inverse_std, scale,
    advantages_ptr, weights_ptr, step_weights_ptr, mask_ptr, kl_gains_ptr,
    clip_low, clip_high, dual_clip, kl_threshold, kl_weight, rows_ptr, shares_ptr,
    IS_NORMALIZED: tl.constexpr,
):  # fmt: skip
    """Statistics of one pair, and its share of the loss with derivatives, not yet divided by the count."""
    gain = b * inverse_std
    kl_old = scale * (0.5 * gain * gain * squares)
    log_ratio = scale * (b * cross) if IS_NORMALIZED else scale * (gain * cross) - kl_old
    kl_ref = scale * kl_gain(kl_gains_ptr, step, gain) * squares_ref
    advantage = tl.load(advantages_ptr + i_b)
    surrogate, grad_log_ratio, side = surrogate_gain(
        log_ratio, kl_old, advantage, clip_low, clip_high, dual_clip, kl_threshold
    )
    weight = 1.0
    if weights_ptr is not None:
        weight = tl.load(weights_ptr + i_b)
    if step_weights_ptr is not None:
        weight *= tl.load(step_weights_ptr + step)
    counts = std > 0
    if mask_ptr is not None:
        counts = counts & (tl.load(mask_ptr + i_b) != 0)
    row_ptr = rows_ptr + i_b * 4
    tl.store(row_ptr, tl.where(counts, log_ratio, 0.0))
    tl.store(row_ptr + 1, tl.where(counts, kl_old, 0.0))
    tl.store(row_ptr + 2, tl.where(counts, kl_ref, 0.0))
    tl.store(row_ptr + 3, tl.where(counts, side, 0.0))
    share_ptr = shares_ptr + i_b * 3
    tl.store(share_ptr, tl.where(counts, weight * (kl_weight * kl_ref - surrogate), 0.0))
    tl.store(share_ptr + 1, tl.where(counts, -weight * grad_log_ratio, 0.0))
    tl.store(share_ptr + 2, tl.where(counts, weight * kl_weight, 0.0))


@triton.jit
def load_counts(mask_ptr, offs_r, mask_r):
    """1 for each row that counts, else 0."""
    if mask_ptr is None:
        counts = mask_r.to(tl.float32)
    else:
        counts = (tl.load(mask_ptr + offs_r, mask=mask_r, other=0) != 0).to(tl.float32)
    return counts


@triton.jit
def totals_kernel(
    rows_ptr, shares_ptr, steps_ptr, mask_ptr, loss_ptr, step_sums_ptr, B, T, BLOCK_R: tl.constexpr
):
    """Program t sums the rows of step t; the last divides the shares by the count and adds the loss up."""
    i_t = tl.program_id(0)
    b_count = tl.zeros((BLOCK_R,), tl.float32)
    if i_t == T:
        for first in range(0, B, BLOCK_R):
            offs_r = first + tl.arange(0, BLOCK_R)
            b_count += load_counts(mask_ptr, offs_r, offs_r < B)
        inverse_count = 1.0 / tl.maximum(tl.sum(b_count, axis=0), 1.0)
        b_loss = tl.zeros((BLOCK_R,), tl.float32)
        for first in range(0, B, BLOCK_R):
            offs_r = first + tl.arange(0, BLOCK_R)
            mask_r = offs_r < B
            cell_ptr = shares_ptr + offs_r * 3
            b_share = inverse_count * tl.load(cell_ptr, mask=mask_r, other=0.0)
            b_grad_ratio = inverse_count * tl.load(cell_ptr + 1, mask=mask_r, other=0.0)
            b_grad_ref = inverse_count * tl.load(cell_ptr + 2, mask=mask_r, other=0.0)
            tl.store(cell_ptr, b_share, mask=mask_r)
            tl.store(cell_ptr + 1, b_grad_ratio, mask=mask_r)
            tl.store(cell_ptr + 2, b_grad_ref, mask=mask_r)
            b_loss += b_share
        tl.store(loss_ptr, tl.sum(b_loss, axis=0))
    else:
        b_log_ratio = tl.zeros((BLOCK_R,), tl.float32)
        b_kl_old = tl.zeros((BLOCK_R,), tl.float32)
        b_kl_ref = tl.zeros((BLOCK_R,), tl.float32)
        b_high = tl.zeros((BLOCK_R,), tl.float32)
        b_low = tl.zeros((BLOCK_R,), tl.float32)
        for first in range(0, B, BLOCK_R):
            offs_r = first + tl.arange(0, BLOCK_R)
            mask_r = offs_r < B
            is_here = mask_r & (tl.load(steps_ptr + offs_r, mask=mask_r, other=-1) == i_t)
            cell_ptr = rows_ptr + offs_r * 4
            b_count += load_counts(mask_ptr, offs_r, is_here)
            b_log_ratio += tl.load(cell_ptr, mask=is_here, other=0.0)
            b_kl_old += tl.load(cell_ptr + 1, mask=is_here, other=0.0)
            b_kl_ref += tl.load(cell_ptr + 2, mask=is_here, other=0.0)
            b_side = tl.load(cell_ptr + 3, mask=is_here, other=0.0)
            b_high += tl.where(b_side > 0, 1.0, 0.0)
            b_low += tl.where(b_side < 0, 1.0, 0.0)
        bin_ptr = step_sums_ptr + i_t * 6
        tl.store(bin_ptr, tl.sum(b_count, axis=0))
        tl.store(bin_ptr + 1, tl.sum(b_log_ratio, axis=0))
        tl.store(bin_ptr + 2, tl.sum(b_kl_old, axis=0))
        tl.store(bin_ptr + 3, tl.sum(b_kl_ref, axis=0))
        tl.store(bin_ptr + 4, tl.sum(b_high, axis=0))
        tl.store(bin_ptr + 5, tl.sum(b_low, axis=0))


def add_up(inputs: Any, outputs: Any) -> None:
    """Fill loss () and step_sums (T, 6); divide shares (B, 3) by the number of rows that count."""
    num_steps = outputs.step_sums.shape[0]
    compiled.run(
        totals_kernel, (num_steps + 1,),
        outputs.rows, outputs.shares, inputs.steps, inputs.mask, outputs.loss, outputs.step_sums,
        inputs.steps.numel(), num_steps,
        BLOCK_R=BLOCK_R, num_warps=TOTAL_WARPS, enable_fp_fusion=False,
    )  # fmt: skip
