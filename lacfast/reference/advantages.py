"""4. Advantages."""

from __future__ import annotations

import torch
from torch import Tensor


def gae(
    rewards: Tensor, values: Tensor, *, gamma: float = 1.0, gae_lambda: float = 1.0, value_lambda: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (arXiv 1506.02438, eq. 16), one chain per trajectory and reward.

        delta_k = r_k + gamma V_{k+1} - V_k,   V_T = 0
        A_k = delta_k + gamma lambda A_{k+1};   returns_k = A_k at value_lambda + V_k

    Chains have a fixed length, so there are no done flags. gae_lambda = 1 gives A_k = R - V_k.

    Args:
        rewards: (B, T, M) reward after each step.
        values: (B, T, M) value before each step.
        gamma: discount, 1 in the paper: the horizon is fixed.
        gae_lambda: of the policy's advantages.
        value_lambda: of the value targets.

    Returns:
        advantages (B, T, M) and returns (B, T, M).
    """
    next_values = torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], dim=1)
    deltas = rewards + gamma * next_values - values
    advantages = _discounted_sum(deltas, gamma * gae_lambda)
    returns = _discounted_sum(deltas, gamma * value_lambda) + values
    return advantages, returns


def _discounted_sum(terms: Tensor, discount: float) -> Tensor:
    """(B, T, M): s_k = terms_k + discount s_{k+1}."""
    total = torch.zeros_like(terms[:, 0])
    sums = []
    for term in reversed(terms.unbind(dim=1)):
        total = term + discount * total
        sums.append(total)
    return torch.stack(sums[::-1], dim=1)
