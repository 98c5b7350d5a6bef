"""value_pool: attention of single queries over normalised tokens, in one read of the features."""

from __future__ import annotations

import warnings
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from lacfast import reference
from lacfast.ops.backend import forced_backend
from lacfast.ops.checks import FLOATS, arithmetic_dtype, check_first, check_operand
from lacfast.ops.op import Op, Sized

TRITON_MAX_DIM = 8192
"""Features of a token that the registers of one program hold."""


def value_pool(
    features: Tensor, query: Tensor, norm_weight: Tensor | None = None, *, eps: float = 1e-6
) -> Tensor:
    """Attention of single queries over normalised tokens.

    The key projection is folded into the query, the value projection into the caller.

        n_l = RMSNorm(features_l) norm_weight;   out_q = sum_l softmax_l(query_q . n_l) n_l

    Each tensor is read in its own dtype and the maths is float32 (float64 for float64 features), inside
    autocast too. Gradients flow to all three tensors. Where the features need none, backward writes nothing
    of their size; where nothing needs one, forward keeps nothing.

    Args:
        features: (B, L, D) tokens.
        query: (B, Q, D), the caller's scale folded in.
        norm_weight: (D,), or None for 1.
        eps: of the RMSNorm.

    Returns:
        (B, Q, D) in the query's dtype.

    Raises:
        ValueError: a shape, dtype, device or memory order that does not fit, or more features than the Triton
            kernel takes where that backend was asked for. Otherwise so wide tokens take the slower reference,
            and a warning says so once.
    """
    _check(features, query, norm_weight)
    chosen = VALUE_POOL.chosen(features)
    if chosen == "triton" and features.shape[2] > TRITON_MAX_DIM:
        chosen = _too_wide(features.shape[2], forced_backend())
    if chosen == "reference":
        # Autocast would round the scores to its own dtype.
        with torch.autocast(features.device.type, enabled=False):
            return reference.value_pool(features, query, norm_weight, eps=eps)
    is_trained = torch.is_grad_enabled() and (
        features.requires_grad
        or query.requires_grad
        or (norm_weight is not None and norm_weight.requires_grad)
    )
    return VALUE_POOL(chosen, ValuePool(features, query, norm_weight, eps, is_trained)).pooled


@cache
def _too_wide(dim: int, forced: str | None) -> str:
    """The backend instead of Triton for tokens of `dim` features; asked once, so it warns once."""
    found = (
        f"features has {dim} features per token and the Triton kernel of value_pool takes {TRITON_MAX_DIM}"
    )
    if forced is not None:
        raise ValueError(f"{found}; leave the backend to lacfast, or call lacfast.reference.value_pool")
    warnings.warn(f"{found}; its slower eager reference runs", RuntimeWarning, stacklevel=3)
    return "reference"


def _check(features: Tensor, query: Tensor, norm_weight: Tensor | None) -> None:
    if features.ndim != 3 or features.numel() == 0:
        raise ValueError(f"features has shape {tuple(features.shape)}; it must be (B, L, D), none of them 0")
    check_first("features", features)
    if query.ndim != 3 or query.shape[1] == 0:
        raise ValueError(f"query has shape {tuple(query.shape)}; it must be (B, Q, D), none of them 0")
    batch, _, dim = features.shape
    # Storage dtypes mix freely; float64 stays among itself.
    dtypes = (torch.float64,) if features.dtype == torch.float64 else FLOATS[:3]
    check_operand("query", query, "features", features, (batch, query.shape[1], dim), dtypes)
    if norm_weight is not None:
        check_operand("norm_weight", norm_weight, "features", features, (dim,), dtypes)


class ValuePool(NamedTuple):
    features: Sized
    query: Sized
    norm_weight: Tensor | None
    eps: float
    is_trained: bool


class ValuePoolOutputs(NamedTuple):
    """All but `pooled` are for the backward pass, in the dtype of the maths, and None where there is none."""

    pooled: Tensor
    tokens: Tensor | None
    """(B, Q, D) `pooled` before the norm's weight."""
    log_sum_exp: Tensor | None
    """(B, Q) of the scores."""
    token_stats: Tensor | None
    """(B, Q + 1, L) every head's scores, then 1 / rms."""


def _allocate(inputs: ValuePool) -> ValuePoolOutputs:
    query = inputs.query
    if not inputs.is_trained:
        return ValuePoolOutputs(torch.empty_like(query), None, None, None)
    dtype = arithmetic_dtype(inputs.features)
    batch, tokens, _ = inputs.features.shape
    heads = query.shape[1]
    return ValuePoolOutputs(
        torch.empty_like(query),
        torch.empty_like(query, dtype=dtype),
        query.new_empty((batch, heads), dtype=dtype),
        query.new_empty((batch, heads + 1, tokens), dtype=dtype),
    )


VALUE_POOL = Op(
    "value_pool",
    ValuePool,
    ValuePoolOutputs,
    _allocate,
    triton=("value_pool", "value_pool_backward"),
    gradients=("features", "query", "norm_weight"),
    keeps=("features", "query", "norm_weight", "tokens", "log_sum_exp", "token_stats"),
    statistics=("tokens", "log_sum_exp", "token_stats"),
)
