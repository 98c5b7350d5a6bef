"""5. Critic: what it reads, and what it explains."""

from __future__ import annotations

import torch
from torch import Tensor

from lacfast.reference.transition import arithmetic_dtype


def value_pool(
    features: Tensor, query: Tensor, norm_weight: Tensor | None = None, *, eps: float = 1e-6
) -> Tensor:
    """Tokens pooled by attention, with one query per head.

        n_l = norm_weight features_l / sqrt( mean(features_l^2) + eps )
        out = sum_l softmax_l(query . n_l) n_l

    The key projection is folded into the query, and the value projection is left to the caller, so that one
    read of the features is enough (arXiv 2605.27736; the folding is ours).

    Args:
        features: (B, L, D) tokens.
        query: (B, heads, D) with the scale of the attention in it.
        norm_weight: (D,) gain of the norm. None: 1.
        eps: added to the mean square.

    Returns:
        (B, heads, D) in the query's dtype.
    """
    dtype = arithmetic_dtype(query)
    tokens = features.to(dtype)
    tokens = tokens * (tokens.square().mean(dim=-1, keepdim=True) + eps).rsqrt()
    if norm_weight is not None:
        tokens = tokens * norm_weight.to(dtype)
    weights = (query.to(dtype) @ tokens.mT).softmax(dim=-1)
    return (weights @ tokens).to(query.dtype)


def explained_variance(values: Tensor, returns: Tensor) -> Tensor:
    """Explained variance 1 - Var(returns - values) / Var(returns) over the first dimension.

    Args:
        values: (B, ...) predictions.
        returns: (B, ...) what they predict.

    Returns:
        (...) at most 1, and below 0 where the mean would predict better; 0 where the returns do not vary.
    """
    variance = returns.var(dim=0, correction=0)
    residual = (returns - values).var(dim=0, correction=0)
    safe = torch.where(variance > 0, variance, torch.ones_like(variance))
    return torch.where(variance > 0, 1 - residual / safe, torch.zeros_like(variance))
