"""value_pool for bfloat16 features on tensor cores: 16 tokens at a time, scores and sums as exact products.

    s_l = r_l (q' . x_l);   sums = sum_l exp(s_l - max) r_l x_l        (the equations are in value_pool.py)
    backward:  t_l = r_l (grad' . x_l);   z = sum_l ds_l r_l x_l       (value_pool_backward.py)

A float32 number is the sum of three bfloat16 numbers, so a float32 vector times bfloat16 tokens is three
products of tensor cores that are exact, summed in float32. The parts of four heads fill the 16 rows of one
operand and the 8 columns of two others. Both products contract a tile of tokens that lies in shared memory
once: the features are read once, whole.

Warps divide the features, not the tokens: a warp's share of a score is added to the others' through shared
memory, 16 x 16 numbers per tile, and its features' sums never leave its registers. More than four heads take
several programs over the same tokens, neighbours in time, so that all but the first read the L2 cache.
Tokens are split by their number alone: a result does not depend on the batch.
"""

# Constants of a kernel are upper case; Triton adds tuples and cannot unpack them.
# ruff: noqa: N803, RUF005

from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from triton.runtime import JITFunction

from . import compiled

BLOCK_L = 16
"""Tokens of a tile: the least that a product of tensor cores contracts."""
HEADS = 4
"""Heads of one program: three parts of each make 12 of 16 rows."""
MAX_SPLITS = 128
"""As many programs for one sample as a GPU has multiprocessors."""
MIN_TILES = 2
"""Tiles of one program: its vectors are prepared once for all of them."""
BLOCK_K = 32
"""Features of a token in one block of a warp: whole sectors of the cache, and registers for no more."""
SHARED_BYTES_PER_FEATURE = 2 * (16 + BLOCK_L)
"""A tile of tokens and 16 rows of parts."""
SHARED_BYTES_PER_WARP = 4 * 16 * BLOCK_L
"""Its share of the tile's scores."""


class TileLaunch(NamedTuple):
    """How the tokens of every sample are divided, whatever the batch."""

    options: dict[str, int]
    num_splits: int
    num_groups: int
    tiles: int


@triton.jit
def three_parts(b_number):
    """Three bfloat16 blocks whose sum is the float32 block: 8 bits of the mantissa each."""
    b_high = b_number.to(tl.bfloat16)
    b_rest = b_number - b_high.to(tl.float32)
    b_middle = b_rest.to(tl.bfloat16)
    b_low = (b_rest - b_middle.to(tl.float32)).to(tl.bfloat16)
    return b_high, b_middle, b_low


# The interpreter keeps bfloat16 as bits, which its products would take for integers.
IS_INTERPRETED = tl.constexpr(not isinstance(three_parts, JITFunction))


@triton.jit
def exact_product(b_left, b_right, b_sums):
    """b_sums + b_left b_right of bfloat16 blocks: exact products, sums in float32."""
    if IS_INTERPRETED:
        b_left = b_left.to(tl.float32)
        b_right = b_right.to(tl.float32)
    return tl.dot(b_left, b_right, b_sums)


@triton.jit
def feature_offsets(i_chunk, WARPS: tl.constexpr, BLOCK_K: tl.constexpr):
    """(WARPS, BLOCK_K) features of a chunk, by the warp that has them."""
    return (i_chunk * WARPS + tl.arange(0, WARPS))[:, None] * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]


@triton.jit
def head_rows(
    vectors_ptr, norm_weight_ptr, i_group, i_chunk, Q,
    D: tl.constexpr, WARPS: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """(WARPS, 16, BLOCK_K) float32: row 4 part + head has that head's vector times the norm's weight."""
    offs_q = (i_group * 4 + tl.arange(0, 16) % 4)[None, :, None]
    offs_d = feature_offsets(i_chunk, WARPS, BLOCK_K)[:, None, :]
    mask = (offs_q < Q) & (offs_d < D)
    b_rows = tl.load(vectors_ptr + offs_q * D + offs_d, mask=mask, other=0.0).to(tl.float32)
    if norm_weight_ptr is not None:
        b_rows *= tl.load(norm_weight_ptr + offs_d, mask=offs_d < D, other=0.0).to(tl.float32)
    return b_rows


@triton.jit
def parts_in_rows(b_rows):
    """The left operand: row 4 part + head has one part of head_rows' numbers, the last four rows 0."""
    part = (tl.arange(0, 16) // 4)[None, :, None]
    b_high, b_middle, b_low = three_parts(b_rows)
    b_part = tl.where(part == 0, b_high, tl.where(part == 1, b_middle, b_low))
    return tl.where(part == 3, 0.0, b_part).to(tl.bfloat16)


@triton.jit
def token_chunk(
    features_ptr, offs_l, i_chunk, L, D: tl.constexpr, WARPS: tl.constexpr, BLOCK_K: tl.constexpr
):
    """(WARPS, BLOCK_K, tokens) as stored, 0 outside. D is a constant: most chunks need no mask for it."""
    offs_d = feature_offsets(i_chunk, WARPS, BLOCK_K)[:, :, None]
    mask = (offs_l < L)[None, None, :]
    if (i_chunk + 1) * WARPS * BLOCK_K > D:
        mask = mask & (offs_d < D)
    return tl.load(features_ptr + offs_l.to(tl.int64)[None, None, :] * D + offs_d, mask=mask, other=0.0)


@triton.jit
def heads_of_rows(b_products):
    """(4, tokens) sums over the warps and the parts of (WARPS, 16, tokens)."""
    b_rows = tl.sum(b_products, axis=0)
    return tl.sum(tl.reshape(b_rows, (4, 4, b_rows.shape[1])), axis=0)


@triton.jit
def parts_in_columns(b_heads, WARPS: tl.constexpr):
    """Two right operands (WARPS, tokens, 8) of (4, tokens): high and middle parts, and low parts and 0."""
    tokens: tl.constexpr = b_heads.shape[1]
    b_twice = tl.reshape(tl.broadcast_to(b_heads[None, :, :], (2, 4, tokens)), (8, tokens))
    b_high, b_middle, b_low = three_parts(tl.permute(b_twice, (1, 0)))
    is_first = (tl.arange(0, 8) < 4)[None, :]
    b_first = tl.where(is_first, b_high, b_middle)
    b_second = tl.where(is_first, b_low, 0.0).to(tl.bfloat16)
    return (
        tl.broadcast_to(b_first[None, :, :], (WARPS, tokens, 8)),
        tl.broadcast_to(b_second[None, :, :], (WARPS, tokens, 8)),
    )


@triton.jit
def heads_of_columns(b_sums):
    """(WARPS, BLOCK_K, 4) of (WARPS, BLOCK_K, 8): the two columns of each head added."""
    return tl.sum(tl.reshape(b_sums, (b_sums.shape[0], b_sums.shape[1], 2, 4)), axis=2)


@triton.jit
def pool_tiles_kernel(
    features_ptr, query_ptr, norm_weight_ptr, pooled_ptr, tokens_ptr, log_sum_exp_ptr, token_stats_ptr,
    partial_ptr, extrema_ptr, L, Q, eps, num_splits, num_groups, tiles,
    D: tl.constexpr, WARPS: tl.constexpr, CHUNKS: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    i_group = tl.program_id(0) % num_groups
    i_split = tl.program_id(0) // num_groups % num_splits
    i_b = (tl.program_id(0) // num_groups // num_splits).to(tl.int64)
    features_ptr += i_b * L * D
    offs_q = i_group * 4 + tl.arange(0, 4)
    mask_q = offs_q < Q
    queries, sums = (), ()
    for i in tl.static_range(CHUNKS):
        b_rows = head_rows(query_ptr + i_b * Q * D, norm_weight_ptr, i_group, i, Q, D, WARPS, BLOCK_K)
        queries = queries + (parts_in_rows(b_rows),)
        sums = sums + (tl.zeros((WARPS, BLOCK_K, 8), tl.float32),)
    maxima = tl.full((4,), float("-inf"), tl.float32)
    totals = tl.zeros((4,), tl.float32)
    first = i_split * tiles * BLOCK_L
    for i_tile in tl.range(tl.minimum(tiles, tl.cdiv(L - first, BLOCK_L)), num_stages=1):
        offs_l = first + i_tile * BLOCK_L + tl.arange(0, BLOCK_L)
        mask_l = offs_l < L
        chunks = ()
        for i in tl.static_range(CHUNKS):
            chunks = chunks + (token_chunk(features_ptr, offs_l, i, L, D, WARPS, BLOCK_K),)
        b_products = tl.zeros((WARPS, 16, BLOCK_L), tl.float32)
        # Sums of 8 features stay within a thread.
        b_squares = tl.zeros((WARPS, BLOCK_K // 8, BLOCK_L), tl.float32)
        for i in tl.static_range(CHUNKS):
            b_products = exact_product(queries[i], chunks[i], b_products)
            b_x = chunks[i].to(tl.float32)
            b_squares += tl.sum(tl.reshape(b_x * b_x, (WARPS, BLOCK_K // 8, 8, BLOCK_L)), axis=2)
        b_scale = 1.0 / tl.sqrt_rn(tl.sum(tl.sum(b_squares, axis=1), axis=0) / D + eps)
        b_score = heads_of_rows(b_products) * b_scale[None, :]
        if token_stats_ptr is not None:
            stats_ptr = token_stats_ptr + i_b * (Q + 1) * L
            mask = mask_q[:, None] & mask_l[None, :]
            tl.store(stats_ptr + offs_q[:, None] * L + offs_l[None, :], b_score, mask=mask)
            # Every group has the same scales; one writes them.
            tl.store(stats_ptr + Q * L + offs_l, b_scale, mask=mask_l & (i_group == 0))
        b_score = tl.where(mask_l[None, :], b_score, float("-inf"))
        new_maxima = tl.maximum(maxima, tl.max(b_score, axis=1))
        decay = tl.exp(maxima - new_maxima)
        b_share = tl.exp(b_score - new_maxima[:, None])
        totals = totals * decay + tl.sum(b_share, axis=1)
        maxima = new_maxima
        b_first, b_second = parts_in_columns(b_share * b_scale[None, :], WARPS)
        decays = tl.reshape(tl.broadcast_to(decay[None, :], (2, 4)), (8,))[None, None, :]
        new_sums = ()
        for i in tl.static_range(CHUNKS):
            b_sums = exact_product(chunks[i], b_first, sums[i] * decays)
            new_sums = new_sums + (exact_product(chunks[i], b_second, b_sums),)
        sums = new_sums
    rows = i_b * Q + offs_q
    if partial_ptr is not None:
        rows = (i_b * num_splits + i_split) * Q + offs_q
        tl.store(extrema_ptr + rows * 2, maxima, mask=mask_q)
        tl.store(extrema_ptr + rows * 2 + 1, totals, mask=mask_q)
    elif tokens_ptr is not None:
        tl.store(log_sum_exp_ptr + rows, maxima + tl.log(totals), mask=mask_q)
    for i in tl.static_range(CHUNKS):
        b_sums = heads_of_columns(sums[i])
        offs_d = feature_offsets(i, WARPS, BLOCK_K)[:, :, None]
        mask = mask_q[None, None, :] & (offs_d < D)
        offs = rows[None, None, :] * D + offs_d
        if partial_ptr is not None:
            tl.store(partial_ptr + offs, b_sums, mask=mask)
        else:
            b_sums /= totals[None, None, :]
            if tokens_ptr is not None:
                tl.store(tokens_ptr + offs, b_sums, mask=mask)
            if norm_weight_ptr is not None:
                b_sums *= tl.load(norm_weight_ptr + offs_d, mask=offs_d < D, other=0.0).to(tl.float32)
            tl.store(pooled_ptr + offs, b_sums.to(pooled_ptr.dtype.element_ty), mask=mask)


@triton.jit
def pool_grad_tiles_kernel(
    features_ptr, norm_weight_ptr, tokens_ptr, log_sum_exp_ptr, token_stats_ptr, grad_ptr,
    partial_ptr, along_ptr, delta_ptr, L, Q, num_splits, num_groups, tiles,
    D: tl.constexpr, WARPS: tl.constexpr, CHUNKS: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    """Per split of the tokens: z to `partial`; where features have a gradient, t to `along` and `delta`."""
    i_group = tl.program_id(0) % num_groups
    i_split = tl.program_id(0) // num_groups % num_splits
    i_b = (tl.program_id(0) // num_groups // num_splits).to(tl.int64)
    features_ptr += i_b * L * D
    stats_ptr = token_stats_ptr + i_b * (Q + 1) * L
    offs_q = i_group * 4 + tl.arange(0, 4)
    mask_q = offs_q < Q
    heads = i_b * Q + offs_q
    b_deltas = tl.zeros((WARPS, 16, BLOCK_K), tl.float32)
    for i in range(CHUNKS):
        b_rows = head_rows(grad_ptr + i_b * Q * D, norm_weight_ptr, i_group, i, Q, D, WARPS, BLOCK_K)
        b_deltas += b_rows * head_rows(tokens_ptr + i_b * Q * D, None, i_group, i, Q, D, WARPS, BLOCK_K)
    # Every part's rows have the same sums.
    delta = tl.max(tl.reshape(tl.sum(tl.sum(b_deltas, axis=2), axis=0), (4, 4)), axis=0)
    if delta_ptr is not None:
        tl.store(delta_ptr + heads, delta, mask=mask_q & (i_split == 0))
    shift = tl.load(log_sum_exp_ptr + heads, mask=mask_q, other=0.0)
    grads, sums = (), ()
    for i in tl.static_range(CHUNKS):
        b_rows = head_rows(grad_ptr + i_b * Q * D, norm_weight_ptr, i_group, i, Q, D, WARPS, BLOCK_K)
        grads = grads + (parts_in_rows(b_rows),)
        sums = sums + (tl.zeros((WARPS, BLOCK_K, 8), tl.float32),)
    first = i_split * tiles * BLOCK_L
    for i_tile in tl.range(tl.minimum(tiles, tl.cdiv(L - first, BLOCK_L)), num_stages=1):
        offs_l = first + i_tile * BLOCK_L + tl.arange(0, BLOCK_L)
        mask_l = offs_l < L
        mask = mask_q[:, None] & mask_l[None, :]
        chunks = ()
        for i in tl.static_range(CHUNKS):
            chunks = chunks + (token_chunk(features_ptr, offs_l, i, L, D, WARPS, BLOCK_K),)
        b_products = tl.zeros((WARPS, 16, BLOCK_L), tl.float32)
        for i in tl.static_range(CHUNKS):
            b_products = exact_product(grads[i], chunks[i], b_products)
        b_scale = tl.load(stats_ptr + Q * L + offs_l, mask=mask_l, other=0.0)
        b_along = heads_of_rows(b_products) * b_scale[None, :]
        if along_ptr is not None:
            tl.store(along_ptr + heads[:, None] * L + offs_l[None, :], b_along, mask=mask)
        if partial_ptr is not None:
            offs = offs_q[:, None] * L + offs_l[None, :]
            b_score = tl.load(stats_ptr + offs, mask=mask, other=float("-inf"))
            b_grad_score = tl.exp(b_score - shift[:, None]) * (b_along - delta[:, None])
            b_first, b_second = parts_in_columns(b_grad_score * b_scale[None, :], WARPS)
            new_sums = ()
            for i in tl.static_range(CHUNKS):
                b_sums = exact_product(chunks[i], b_first, sums[i])
                new_sums = new_sums + (exact_product(chunks[i], b_second, b_sums),)
            sums = new_sums
    if partial_ptr is not None:
        rows = (i_b * num_splits + i_split) * Q + offs_q
        for i in tl.static_range(CHUNKS):
            offs_d = feature_offsets(i, WARPS, BLOCK_K)[:, :, None]
            mask = mask_q[None, None, :] & (offs_d < D)
            tl.store(partial_ptr + rows[None, None, :] * D + offs_d, heads_of_columns(sums[i]), mask=mask)


@cache
def tile_launch(
    dtype: torch.dtype, tokens: int, dim: int, num_heads: int, shared_bytes: int
) -> TileLaunch | None:
    """The launch for features (B, tokens, dim), or None where these kernels do not take them.

    They take bfloat16, rows of whole vectors, and what fits into `shared_bytes` of a multiprocessor.
    """
    # Four warps leave room for a second program beside the first.
    warps = min(4 if dim <= 1536 else 8, triton.next_power_of_2(triton.cdiv(dim, BLOCK_K)))
    chunks = triton.cdiv(dim, warps * BLOCK_K)
    options = {
        "D": dim,
        "WARPS": warps,
        "CHUNKS": chunks,
        "BLOCK_K": BLOCK_K,
        "BLOCK_L": BLOCK_L,
        "num_warps": warps,
        "enable_fp_fusion": True,
    }
    if dtype != torch.bfloat16 or dim % 8 or shared_bytes_needed(options) > shared_bytes:
        return None
    all_tiles = triton.cdiv(tokens, BLOCK_L)
    tiles = max(MIN_TILES, triton.cdiv(all_tiles, MAX_SPLITS))
    return TileLaunch(options, triton.cdiv(all_tiles, tiles), triton.cdiv(num_heads, HEADS), tiles)


def shared_bytes_needed(options: dict[str, int]) -> int:
    """Shared memory of one program."""
    features = options["CHUNKS"] * options["WARPS"] * options["BLOCK_K"]
    return SHARED_BYTES_PER_FEATURE * features + SHARED_BYTES_PER_WARP * options["WARPS"]


def pool_tiles(
    launch: TileLaunch, inputs: Any, outputs: Any, partial: torch.Tensor | None, extrema: torch.Tensor | None
) -> None:
    """Fill the outputs, or where the tokens are split `partial` and `extrema` of every split."""
    batch, tokens, _ = inputs.features.shape
    compiled.run(
        pool_tiles_kernel, (batch * launch.num_splits * launch.num_groups,),
        inputs.features, inputs.query, inputs.norm_weight, *outputs, partial, extrema,
        tokens, inputs.query.shape[1], inputs.eps, launch.num_splits, launch.num_groups, launch.tiles,
        **launch.options,
    )  # fmt: skip


def pool_grad_tiles(
    launch: TileLaunch, inputs: Any, outputs: Any, grad: torch.Tensor,
    partial: torch.Tensor | None, along: torch.Tensor | None, delta: torch.Tensor | None,
) -> None:  # fmt: skip
    """Fill z of every split (B, splits, Q, D), along (B, Q, L) and delta (B, Q), where they are asked for."""
    batch, tokens, _ = inputs.features.shape
    compiled.run(
        pool_grad_tiles_kernel, (batch * launch.num_splits * launch.num_groups,),
        inputs.features, inputs.norm_weight, outputs.tokens, outputs.log_sum_exp, outputs.token_stats, grad,
        partial, along, delta,
        tokens, inputs.query.shape[1], launch.num_splits, launch.num_groups, launch.tiles, **launch.options,
    )  # fmt: skip
