"""Gradients of value_pool, with the forward's scores s, scales r and log-sum-exp at hand.

With grad' = grad w, q' = query w (w the norm's weight), p = exp(s - log_sum_exp):
    t_l = r_l (grad' . x_l);   ds_l = p_l (t_l - grad' . pooled);   z = sum_l ds_l r_l x_l
    grad_query = w z;   grad_w = sum_{b,h} query z + grad pooled
    grad_x_l = w r_l sum_q (ds_l query + p_l grad) - x_l r_l^2 / D sum_q (ds_l s_l + p_l t_l)

Bytes: the features are read once for z; for grad_x once more, and as much is written. Where the features are
detached nothing of their size is written and the backward of the norm does not exist. Their one read cannot
be saved: z is the covariance of the tokens under p times grad', known only now, and a table that gives it
for every grad' is of the rank of the tokens. The scores are kept instead of computed again: Q + 1 numbers per
token, for D multiplications of each head.

Sums over tokens and over samples are in a fixed order without atomics; those of one sample do not depend on
the batch.
"""

# Constants of a kernel are upper case; Triton adds tuples and cannot unpack them.
# ruff: noqa: N803, RUF005

from typing import Any

import torch
import triton
import triton.language as tl

from . import compiled, value_pool_tiles
from .value_pool import (
    COMBINE_BLOCK,
    COMBINE_SPLITS,
    COMBINE_WARPS,
    partial_block,
    pool_launch,
    tiles_launch,
    token_tile,
    weighted_head,
)

# Tokens x features of one program of the features' gradient, and its warps.
FEATURES_BLOCK = (16, 128, 4)
# Rows x features that are added at a time for the norm's weight, and warps.
WEIGHT_BLOCK = (16, 64, 4)


@triton.jit
def pool_grad_kernel(
    features_ptr, norm_weight_ptr, tokens_ptr, log_sum_exp_ptr, token_stats_ptr, grad_ptr,
    partial_ptr, along_ptr, delta_ptr, L, D, Q, num_splits, num_groups, tiles,
    BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr, HEADS: tl.constexpr,
    HAS_WEIGHT: tl.constexpr, HAS_SUMS: tl.constexpr, HAS_ALONG: tl.constexpr,
):  # fmt: skip
    """Per split of the tokens: z to `partial`; where features have a gradient, t to `along` and `delta`."""
    i_group = tl.program_id(0) % num_groups
    i_split = tl.program_id(0) // num_groups % num_splits
    i_b = tl.program_id(0) // num_groups // num_splits
    offs_d = tl.arange(0, BLOCK_D)
    stats_ptr = token_stats_ptr + i_b.to(tl.int64) * (Q + 1) * L
    heads_ptr = i_b.to(tl.int64) * Q
    grads, sums, deltas = (), (), ()
    for i in tl.static_range(HEADS):
        i_q = i_group * HEADS + i
        b_grad = weighted_head(grad_ptr, norm_weight_ptr, i_b, i_q, offs_d, Q, D, HAS_WEIGHT)
        b_tokens = weighted_head(tokens_ptr, norm_weight_ptr, i_b, i_q, offs_d, Q, D, False)
        delta = tl.sum(b_grad * b_tokens, axis=0)
        if HAS_ALONG:
            tl.store(delta_ptr + heads_ptr + i_q, delta, mask=(i_q < Q) & (i_split == 0))
        grads = grads + (b_grad,)
        sums = sums + (tl.zeros((BLOCK_D,), tl.float32),)
        deltas = deltas + (delta,)
    first = i_split * tiles * BLOCK_L
    for i_tile in range(tl.minimum(tiles, tl.cdiv(L - first, BLOCK_L))):
        offs_l = first + i_tile * BLOCK_L + tl.arange(0, BLOCK_L)
        mask_l = offs_l < L
        b_x = token_tile(features_ptr, i_b, offs_l, offs_d, L, D)
        b_scale = tl.load(stats_ptr + Q * L + offs_l, mask=mask_l, other=0.0)
        new_sums = ()
        for i in tl.static_range(HEADS):
            i_q = i_group * HEADS + i
            mask_s = mask_l & (i_q < Q)
            b_along = tl.sum(grads[i][None, :] * b_x, axis=1) * b_scale
            if HAS_ALONG:
                tl.store(along_ptr + (heads_ptr + i_q) * L + offs_l, b_along, mask=mask_s)
            if HAS_SUMS:
                b_score = tl.load(stats_ptr + i_q * L + offs_l, mask=mask_s, other=float("-inf"))
                # Read again for every tile: a register per head decides whether the rest fits.
                shift = tl.load(log_sum_exp_ptr + heads_ptr + i_q, mask=i_q < Q, other=0.0)
                b_grad_score = tl.exp(b_score - shift) * (b_along - deltas[i])
                b_tile_sum = tl.sum((b_grad_score * b_scale)[:, None] * b_x, axis=0)
                new_sums = new_sums + (sums[i] + b_tile_sum,)
        if HAS_SUMS:
            sums = new_sums
    if HAS_SUMS:
        for i in tl.static_range(HEADS):
            i_q = i_group * HEADS + i
            row = (i_b.to(tl.int64) * num_splits + i_split) * Q + i_q
            tl.store(partial_ptr + row * D + offs_d, sums[i], mask=(offs_d < D) & (i_q < Q))


@triton.jit
def finish_heads_kernel(
    partial_ptr, query_ptr, norm_weight_ptr, tokens_ptr, grad_ptr, grad_query_ptr, products_ptr,
    D, Q, num_splits, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr, HAS_WEIGHT: tl.constexpr,
    HAS_QUERY_GRAD: tl.constexpr, HAS_WEIGHT_GRAD: tl.constexpr,
):  # fmt: skip
    """z of one head from its splits; grad_query, and query z + grad pooled for the norm's weight."""
    i_row = tl.program_id(0)
    offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    first = (i_row // Q).to(tl.int64) * num_splits * Q + i_row % Q
    b_sums = tl.zeros((BLOCK_S, BLOCK_D), tl.float32)
    for i_block in range(tl.cdiv(num_splits, BLOCK_S)):
        offs_s = i_block * BLOCK_S + tl.arange(0, BLOCK_S)
        b_sums += partial_block(partial_ptr, first, offs_s, offs_d, num_splits, D, Q)
    b_z = tl.sum(b_sums, axis=0)
    offs = i_row.to(tl.int64) * D + offs_d
    if HAS_WEIGHT_GRAD:
        b_query = tl.load(query_ptr + offs, mask=mask_d, other=0.0).to(tl.float32)
        b_grad = tl.load(grad_ptr + offs, mask=mask_d, other=0.0).to(tl.float32)
        b_tokens = tl.load(tokens_ptr + offs, mask=mask_d, other=0.0)
        tl.store(products_ptr + offs, b_query * b_z + b_grad * b_tokens, mask=mask_d)
    if HAS_QUERY_GRAD:
        if HAS_WEIGHT:
            b_z *= tl.load(norm_weight_ptr + offs_d, mask=mask_d, other=0.0).to(tl.float32)
        tl.store(grad_query_ptr + offs, b_z.to(grad_query_ptr.dtype.element_ty), mask=mask_d)


@triton.jit
def norm_weight_grad_kernel(
    products_ptr, grad_norm_weight_ptr, D, rows, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Second stage: sum of the (rows, D) products over samples and heads."""
    offs_d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    b_sums = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    for i_block in range(tl.cdiv(rows, BLOCK_R)):
        offs_r = i_block * BLOCK_R + tl.arange(0, BLOCK_R)
        mask = (offs_r[:, None] < rows) & (offs_d[None, :] < D)
        b_sums += tl.load(
            products_ptr + offs_r.to(tl.int64)[:, None] * D + offs_d[None, :], mask=mask, other=0.0
        )
    b_sum = tl.sum(b_sums, axis=0).to(grad_norm_weight_ptr.dtype.element_ty)
    tl.store(grad_norm_weight_ptr + offs_d, b_sum, mask=offs_d < D)


@triton.jit
def features_grad_kernel(
    features_ptr, query_ptr, norm_weight_ptr, log_sum_exp_ptr, token_stats_ptr, grad_ptr,
    along_ptr, delta_ptr, grad_features_ptr, L, D, Q,
    BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr, HAS_WEIGHT: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(L, BLOCK_L)
    i_b = tl.program_id(0) // tiles
    offs_l = tl.program_id(0) % tiles * BLOCK_L + tl.arange(0, BLOCK_L)
    offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_l = offs_l < L
    stats_ptr = token_stats_ptr + i_b.to(tl.int64) * (Q + 1) * L
    heads_ptr = i_b.to(tl.int64) * Q
    b_scale = tl.load(stats_ptr + Q * L + offs_l, mask=mask_l, other=0.0)
    b_sums = tl.zeros((BLOCK_L, BLOCK_D), tl.float32)
    b_shrink = tl.zeros((BLOCK_L,), tl.float32)
    for i_q in range(Q):
        b_score = tl.load(stats_ptr + i_q * L + offs_l, mask=mask_l, other=0.0)
        b_along = tl.load(along_ptr + (heads_ptr + i_q) * L + offs_l, mask=mask_l, other=0.0)
        b_share = tl.exp(b_score - tl.load(log_sum_exp_ptr + heads_ptr + i_q))
        b_grad_score = b_share * (b_along - tl.load(delta_ptr + heads_ptr + i_q))
        b_query = weighted_head(query_ptr, norm_weight_ptr, i_b, i_q, offs_d, Q, D, HAS_WEIGHT)
        b_grad = weighted_head(grad_ptr, norm_weight_ptr, i_b, i_q, offs_d, Q, D, HAS_WEIGHT)
        b_sums += b_grad_score[:, None] * b_query[None, :] + b_share[:, None] * b_grad[None, :]
        b_shrink += b_grad_score * b_score + b_share * b_along
    b_x = token_tile(features_ptr, i_b, offs_l, offs_d, L, D)
    b_shrink *= b_scale * b_scale / D
    b_grad_x = (b_sums * b_scale[:, None] - b_shrink[:, None] * b_x).to(grad_features_ptr.dtype.element_ty)
    mask = mask_l[:, None] & (offs_d[None, :] < D)
    rows = (i_b.to(tl.int64) * L + offs_l)[:, None] * D
    tl.store(
        grad_features_ptr + rows + offs_d[None, :], b_grad_x.to(grad_features_ptr.dtype.element_ty), mask=mask
    )


def value_pool_backward(inputs: Any, outputs: Any, grads: Any, gradients: Any) -> None:
    """Fill the gradients that are not None, each like its tensor."""
    features, query, norm_weight, _, _ = inputs
    _, pooled_tokens, log_sum_exp, token_stats = outputs
    grad_features, grad_query, grad_norm_weight, _, _ = gradients
    grad = grads.pooled
    batch, tokens, dim = features.shape
    num_heads = query.shape[1]
    rows = batch * num_heads
    on_tiles = tiles_launch(features, num_heads)
    if on_tiles is not None:
        num_splits = on_tiles.num_splits
    else:
        options, (num_splits, num_groups, tiles) = pool_launch(features, num_heads)
    has_weight = norm_weight is not None
    has_sums = grad_query is not None or grad_norm_weight is not None

    def workspace(is_needed: bool, numbers: int) -> torch.Tensor | None:
        return torch.empty(numbers, dtype=torch.float32, device=features.device) if is_needed else None

    partial = workspace(has_sums, rows * num_splits * dim)
    along = workspace(grad_features is not None, rows * tokens)
    delta = workspace(grad_features is not None, rows)
    if on_tiles is not None:
        value_pool_tiles.pool_grad_tiles(on_tiles, inputs, outputs, grad, partial, along, delta)
    else:
        compiled.run(
            pool_grad_kernel, (batch * num_splits * num_groups,),
            features, norm_weight, pooled_tokens, log_sum_exp, token_stats, grad, partial, along, delta,
            tokens, dim, num_heads, num_splits, num_groups, tiles,
            HAS_WEIGHT=has_weight, HAS_SUMS=has_sums, HAS_ALONG=grad_features is not None, **options,
        )  # fmt: skip
    if has_sums:
        products = workspace(grad_norm_weight is not None, rows * dim)
        compiled.run(
            finish_heads_kernel, (rows, triton.cdiv(dim, COMBINE_BLOCK)),
            partial, query, norm_weight, pooled_tokens, grad, grad_query, products,
            dim, num_heads, num_splits,
            BLOCK_S=COMBINE_SPLITS, BLOCK_D=COMBINE_BLOCK, HAS_WEIGHT=has_weight,
            HAS_QUERY_GRAD=grad_query is not None, HAS_WEIGHT_GRAD=grad_norm_weight is not None,
            num_warps=COMBINE_WARPS, enable_fp_fusion=True,
        )  # fmt: skip
        if grad_norm_weight is not None:
            block_r, block_d, num_warps = WEIGHT_BLOCK
            compiled.run(
                norm_weight_grad_kernel, (triton.cdiv(dim, block_d),),
                products, grad_norm_weight, dim, rows,
                BLOCK_R=block_r, BLOCK_D=block_d, num_warps=num_warps, enable_fp_fusion=True,
            )  # fmt: skip
    if grad_features is not None:
        block_l, block_d, num_warps = FEATURES_BLOCK
        compiled.run(
            features_grad_kernel, (batch * triton.cdiv(tokens, block_l), triton.cdiv(dim, block_d)),
            features, query, norm_weight, log_sum_exp, token_stats, grad, along, delta, grad_features,
            tokens, dim, num_heads, BLOCK_L=block_l, BLOCK_D=block_d, HAS_WEIGHT=has_weight,
            num_warps=num_warps, enable_fp_fusion=True,
        )  # fmt: skip
