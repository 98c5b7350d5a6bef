"""value_pool in C++."""

from __future__ import annotations

import torch
from torch import Tensor

from lacfast import _C
from lacfast.ops.cpu.addresses import DTYPE_CODES, address, code


def _pool_arguments(
    features: Tensor, query: Tensor, norm_weight: Tensor | None, eps: float
) -> tuple[int, int, int, int, int, int, int, int, int, int, float]:
    rows, tokens, dim = features.shape
    return (
        rows,
        tokens,
        query.shape[1],
        dim,
        features.data_ptr(),
        DTYPE_CODES[features.dtype],
        query.data_ptr(),
        DTYPE_CODES[query.dtype],
        address(norm_weight),
        code(norm_weight),
        eps,
    )


def value_pool_forward(
    features: Tensor,
    query: Tensor,
    norm_weight: Tensor | None,
    eps: float,
    out: Tensor,
    pooled: Tensor | None,
    log_sum_exp: Tensor | None,
    token_stats: Tensor | None,
) -> None:
    _C.value_pool_forward(
        *_pool_arguments(features, query, norm_weight, eps),
        out.data_ptr(),
        address(pooled),
        address(log_sum_exp),
        address(token_stats),
        torch.get_num_threads(),
    )


def value_pool_backward(
    features: Tensor,
    query: Tensor,
    norm_weight: Tensor | None,
    pooled: Tensor,
    log_sum_exp: Tensor,
    token_stats: Tensor,
    grad: Tensor,
    grad_features: Tensor | None,
    grad_query: Tensor | None,
    grad_norm_weight: Tensor | None,
) -> None:
    # eps has done its work: the reciprocal rms of every token is among token_stats.
    _C.value_pool_backward(
        *_pool_arguments(features, query, norm_weight, 0.0),
        pooled.data_ptr(),
        log_sum_exp.data_ptr(),
        token_stats.data_ptr(),
        grad.data_ptr(),
        address(grad_features),
        address(grad_query),
        address(grad_norm_weight),
        torch.get_num_threads(),
    )
