"""6. Critic: what it reads and what it explains."""

from __future__ import annotations

import torch
from torch import Tensor

from lacfast.reference.transition import arithmetic_dtype


def value_pool(
    features: Tensor, query: Tensor, norm_weight: Tensor | None = None, *, eps: float = 1e-6
) -> Tensor:
    """Attention of single queries over normalised tokens.

    The key projection is folded into the query, the value projection into the caller.

        n_l = RMSNorm(features_l) norm_weight;   out_h = sum_l softmax_l(query_h . n_l) n_l

    Args:
        features: (B, L, D) tokens.
        query: (B, H, D), the caller's scale folded in.
        norm_weight: (D,), or None for 1.
        eps: of the RMSNorm.

    Returns:
        (B, H, D) in the query's dtype; computed in float32 at least.
    """
    dtype = arithmetic_dtype(query)
    tokens = features.to(dtype)
    tokens = tokens * (tokens.square().mean(dim=-1, keepdim=True) + eps).rsqrt()
    if norm_weight is not None:
        tokens = tokens * norm_weight.to(dtype)
    weights = (query.to(dtype) @ tokens.mT).softmax(dim=-1)
    return (weights @ tokens).to(query.dtype)


def explained_variance(values: Tensor, returns: Tensor) -> Tensor:
    """EV = 1 - Var(R - V) / Var(R) over the first dimension; 0 where the returns do not vary.

    Args:
        values: (B, ...) predictions.
        returns: (B, ...) what they predict.

    Returns:
        (...) at most 1; below 0 when the prediction is worse than the mean.
    """
    variance = returns.var(dim=0, correction=0)
    residual = (returns - values).var(dim=0, correction=0)
    safe = torch.where(variance > 0, variance, torch.ones_like(variance))
    return torch.where(variance > 0, 1 - residual / safe, torch.zeros_like(variance))
