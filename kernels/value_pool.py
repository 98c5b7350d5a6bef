"""Attention of single queries over normalised tokens, all heads and the norm in one read of the features.

    n_l = r_l x_l w,  r_l = 1 / sqrt(mean(x_l^2) + eps);   out_q = sum_l softmax_l(query_q . n_l) n_l
with q' = query w, so that the norm's weight w never meets a token:
    s_l = r_l (q' . x_l);   p = softmax(s);   pooled = sum_l p_l r_l x_l;   out = w pooled

Bytes: the features are read once; Q (D + 1) + L (Q + 1) numbers per sample are written, the latter only
where a backward will come. Eagerly the features are read three times, and a normalised copy in float32 is
written once and read twice.

For bfloat16 features value_pool_tiles.py has the passes over tokens, on tensor cores. For the others a
program here holds whole tokens in registers: a few at a time, their scores and then their share of the sums,
rescaled when the maximum grows (streaming softmax). More heads than `program_heads` take several programs
over the same tokens, neighbours in time, so that all but the first read the L2 cache. The tokens of one
sample are split among at most MAX_SPLITS programs by their number alone and added in a fixed order without
atomics: a result does not depend on the batch.
"""

# Constants of a kernel are upper case; Triton adds tuples and cannot unpack them.
# ruff: noqa: N803, RUF005

from typing import Any

import torch
import triton
import triton.language as tl

from . import compiled, launch, value_pool_tiles

MAX_SPLITS = 32
MAX_HEADS = 4
"""Heads of one program: q' and the sums of four fill half of the registers."""
WIDE = 4096
"""Features of a token beyond which two heads fill as many."""
COMBINE_SPLITS = 32
COMBINE_BLOCK = 64
"""Splits and features that are added at a time: enough loads under way to hide each other."""
COMBINE_WARPS = 4
MAX_REGISTERS = 128
"""Two tokens, q' and the sums of four heads fit; more would halve the programs of a multiprocessor."""


@triton.jit
def weighted_head(heads_ptr, norm_weight_ptr, i_b, i_q, offs_d, Q, D, HAS_WEIGHT: tl.constexpr):
    """(BLOCK_D,) vector of one head times the norm's weight, in float32; 0 for a head beyond the last."""
    mask = (offs_d < D) & (i_q < Q)
    b_head = tl.load(heads_ptr + (i_b.to(tl.int64) * Q + i_q) * D + offs_d, mask=mask, other=0.0).to(
        tl.float32
    )
    if HAS_WEIGHT:
        b_head *= tl.load(norm_weight_ptr + offs_d, mask=offs_d < D, other=0.0).to(tl.float32)
    return b_head


@triton.jit
def token_tile(features_ptr, i_b, offs_l, offs_d, L, D):
    """(BLOCK_L, BLOCK_D) tokens in float32, 0 outside."""
    mask = (offs_l[:, None] < L) & (offs_d[None, :] < D)
    rows = (i_b.to(tl.int64) * L + offs_l)[:, None] * D
    return tl.load(features_ptr + rows + offs_d[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def store_pooled(
    b_pooled, log_sum_exp, norm_weight_ptr, pooled_ptr, tokens_ptr, log_sum_exp_ptr, i_b, i_q, offs_d, Q, D,
    HAS_WEIGHT: tl.constexpr, IS_SAVED: tl.constexpr,
):  # fmt: skip
    """(BLOCK_D,) of one head: times the norm's weight to `out`, as it is to what backward needs."""
    mask = (offs_d < D) & (i_q < Q)
    row = i_b.to(tl.int64) * Q + i_q
    if IS_SAVED:
        tl.store(tokens_ptr + row * D + offs_d, b_pooled, mask=mask)
        tl.store(log_sum_exp_ptr + row, log_sum_exp, mask=i_q < Q)
    if HAS_WEIGHT:
        b_pooled *= tl.load(norm_weight_ptr + offs_d, mask=offs_d < D, other=0.0).to(tl.float32)
    tl.store(pooled_ptr + row * D + offs_d, b_pooled.to(pooled_ptr.dtype.element_ty), mask=mask)


@triton.jit
def pool_kernel(
    features_ptr, query_ptr, norm_weight_ptr, pooled_ptr, tokens_ptr, log_sum_exp_ptr, token_stats_ptr,
    partial_ptr, extrema_ptr, L, D, Q, eps, num_splits, num_groups, tiles,
    BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr, HEADS: tl.constexpr,
    HAS_WEIGHT: tl.constexpr, IS_SPLIT: tl.constexpr, IS_SAVED: tl.constexpr,
):  # fmt: skip
    i_group = tl.program_id(0) % num_groups
    i_split = tl.program_id(0) // num_groups % num_splits
    i_b = tl.program_id(0) // num_groups // num_splits
    offs_d = tl.arange(0, BLOCK_D)
    stats_ptr = token_stats_ptr
    if IS_SAVED:
        stats_ptr += i_b.to(tl.int64) * (Q + 1) * L
    # One block per head: a block of all heads would change its layout in every tile.
    queries, sums, maxima, totals = (), (), (), ()
    for i in tl.static_range(HEADS):
        i_q = i_group * HEADS + i
        b_query = weighted_head(query_ptr, norm_weight_ptr, i_b, i_q, offs_d, Q, D, HAS_WEIGHT)
        queries = queries + (b_query,)
        sums = sums + (tl.zeros((BLOCK_D,), tl.float32),)
        maxima = maxima + (float("-inf"),)
        totals = totals + (0.0,)
    first = i_split * tiles * BLOCK_L
    for i_tile in range(tl.minimum(tiles, tl.cdiv(L - first, BLOCK_L))):
        offs_l = first + i_tile * BLOCK_L + tl.arange(0, BLOCK_L)
        mask_l = offs_l < L
        b_x = token_tile(features_ptr, i_b, offs_l, offs_d, L, D)
        b_scale = 1.0 / tl.sqrt_rn(tl.sum(b_x * b_x, axis=1) / D + eps)
        new_sums, new_maxima, new_totals = (), (), ()
        for i in tl.static_range(HEADS):
            b_score = tl.sum(queries[i][None, :] * b_x, axis=1) * b_scale
            if IS_SAVED:
                i_q = i_group * HEADS + i
                tl.store(stats_ptr + i_q * L + offs_l, b_score, mask=mask_l & (i_q < Q))
            b_score = tl.where(mask_l, b_score, float("-inf"))
            maximum = tl.maximum(maxima[i], tl.max(b_score, axis=0))
            decay = tl.exp(maxima[i] - maximum)
            b_share = tl.exp(b_score - maximum)
            new_maxima = new_maxima + (maximum,)
            new_totals = new_totals + (totals[i] * decay + tl.sum(b_share, axis=0),)
            new_sums = new_sums + (sums[i] * decay + tl.sum((b_share * b_scale)[:, None] * b_x, axis=0),)
        sums, maxima, totals = new_sums, new_maxima, new_totals
        if IS_SAVED:
            # Every group has the same scales; one writes them.
            tl.store(stats_ptr + Q * L + offs_l, b_scale, mask=mask_l & (i_group == 0))
    for i in tl.static_range(HEADS):
        i_q = i_group * HEADS + i
        if IS_SPLIT:
            row = (i_b.to(tl.int64) * num_splits + i_split) * Q + i_q
            tl.store(partial_ptr + row * D + offs_d, sums[i], mask=(offs_d < D) & (i_q < Q))
            tl.store(extrema_ptr + row * 2, maxima[i], mask=i_q < Q)
            tl.store(extrema_ptr + row * 2 + 1, totals[i], mask=i_q < Q)
        else:
            store_pooled(
                sums[i] / totals[i], maxima[i] + tl.log(totals[i]), norm_weight_ptr,
                pooled_ptr, tokens_ptr, log_sum_exp_ptr, i_b, i_q, offs_d, Q, D, HAS_WEIGHT, IS_SAVED,
            )  # fmt: skip


@triton.jit
def partial_block(partial_ptr, first, offs_s, offs_d, num_splits, D, Q):
    """(splits, features) of the sums of one head of one sample, 0 outside."""
    mask = (offs_s < num_splits)[:, None] & (offs_d < D)[None, :]
    return tl.load(partial_ptr + (first + offs_s * Q)[:, None] * D + offs_d[None, :], mask=mask, other=0.0)


@triton.jit
def combine_kernel(
    partial_ptr, extrema_ptr, norm_weight_ptr, pooled_ptr, tokens_ptr, log_sum_exp_ptr, D, Q, num_splits,
    ALL_SPLITS: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
    HAS_WEIGHT: tl.constexpr, IS_SAVED: tl.constexpr,
):  # fmt: skip
    i_b = tl.program_id(0) // Q
    i_q = tl.program_id(0) % Q
    offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    first = i_b.to(tl.int64) * num_splits * Q + i_q
    offs_s = tl.arange(0, ALL_SPLITS)
    mask_s = offs_s < num_splits
    b_max = tl.load(extrema_ptr + (first + offs_s * Q) * 2, mask=mask_s, other=float("-inf"))
    b_total = tl.load(extrema_ptr + (first + offs_s * Q) * 2 + 1, mask=mask_s, other=0.0)
    maximum = tl.max(b_max, axis=0)
    total = tl.sum(b_total * tl.exp(b_max - maximum), axis=0)
    b_sums = tl.zeros((BLOCK_S, BLOCK_D), tl.float32)
    for i_block in range(tl.cdiv(num_splits, BLOCK_S)):
        offs_block = i_block * BLOCK_S + tl.arange(0, BLOCK_S)
        b_partial = partial_block(partial_ptr, first, offs_block, offs_d, num_splits, D, Q)
        row_ptr = extrema_ptr + (first + offs_block * Q) * 2
        b_share = tl.exp(tl.load(row_ptr, mask=offs_block < num_splits, other=float("-inf")) - maximum)
        b_sums += b_share[:, None] * b_partial
    store_pooled(
        tl.sum(b_sums, axis=0) / total, maximum + tl.log(total), norm_weight_ptr,
        pooled_ptr, tokens_ptr, log_sum_exp_ptr, i_b, i_q, offs_d, Q, D, HAS_WEIGHT, IS_SAVED,
    )  # fmt: skip


def program_heads(dim: int, num_heads: int) -> int:
    """Heads of one program, a power of 2."""
    return min(triton.next_power_of_2(num_heads), MAX_HEADS if dim <= WIDE else MAX_HEADS // 2)


def pool_launch(features: torch.Tensor, num_heads: int) -> tuple[dict[str, int], tuple[int, int, int]]:
    """Launch options for a shape, and (num_splits, num_groups, tiles) of its programs."""
    _, tokens, dim = features.shape
    architecture = launch.architecture_of(features.device)
    block_l, _, num_warps, _ = launch.pick_launch("value_pool", dim, architecture)
    heads = program_heads(dim, num_heads)
    tiles = triton.cdiv(triton.cdiv(tokens, block_l), MAX_SPLITS)
    options = {
        "BLOCK_L": block_l,
        "BLOCK_D": max(16, triton.next_power_of_2(dim)),
        "HEADS": heads,
        "num_warps": num_warps,
        "maxnreg": MAX_REGISTERS,
        "enable_fp_fusion": True,
    }
    return options, (triton.cdiv(tokens, block_l * tiles), triton.cdiv(num_heads, heads), tiles)


def tiles_launch(features: torch.Tensor, num_heads: int) -> value_pool_tiles.TileLaunch | None:
    """The launch on tensor cores; None where the features are not for them."""
    _, tokens, dim = features.shape
    shared_bytes = launch.shared_bytes(features.device)
    return value_pool_tiles.tile_launch(features.dtype, tokens, dim, num_heads, shared_bytes)


def value_pool(inputs: Any, outputs: Any) -> None:
    """Fill pooled (B, Q, D), and for a backward tokens, log_sum_exp (B, Q) and token_stats (B, Q + 1, L)."""
    features, query, norm_weight, eps, _ = inputs
    batch, tokens, dim = features.shape
    num_heads = query.shape[1]
    on_tiles = tiles_launch(features, num_heads)
    if on_tiles is not None:
        num_splits = on_tiles.num_splits
    else:
        options, (num_splits, num_groups, tiles) = pool_launch(features, num_heads)
    partial = extrema = None
    if num_splits > 1:
        rows = batch * num_splits * num_heads
        partial = torch.empty(rows * dim, dtype=torch.float32, device=features.device)
        extrema = torch.empty(rows * 2, dtype=torch.float32, device=features.device)
    flags = {"HAS_WEIGHT": norm_weight is not None, "IS_SAVED": outputs.tokens is not None}
    if on_tiles is not None:
        value_pool_tiles.pool_tiles(on_tiles, inputs, outputs, partial, extrema)
    else:
        compiled.run(
            pool_kernel, (batch * num_splits * num_groups,),
            features, query, norm_weight, *outputs, partial, extrema,
            tokens, dim, num_heads, eps, num_splits, num_groups, tiles,
            IS_SPLIT=num_splits > 1, **flags, **options,
        )  # fmt: skip
    if num_splits > 1:
        compiled.run(
            combine_kernel, (batch * num_heads, triton.cdiv(dim, COMBINE_BLOCK)),
            partial, extrema, norm_weight, outputs.pooled, outputs.tokens, outputs.log_sum_exp,
            dim, num_heads, num_splits,
            ALL_SPLITS=triton.next_power_of_2(num_splits), BLOCK_S=COMBINE_SPLITS, BLOCK_D=COMBINE_BLOCK,
            num_warps=COMBINE_WARPS, enable_fp_fusion=True, **flags,
        )  # fmt: skip
