"""3. Advantages: GAE per reward, then one number per step from all rewards."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lacfast.records import NormalizedAdvantages, RewardCondition
from lacfast.reference.transition import arithmetic_dtype

ROUNDING = 1e-12
"""A variance below this part of the mean square is rounding: the quantity does not vary."""


def gae(
    rewards: Tensor,
    values: Tensor,
    *,
    gamma: float = 1.0,
    gae_lambda: float | Tensor = 1.0,
    value_lambda: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Generalised advantages (arXiv 1506.02438, eq. 16) of one chain per trajectory and reward.

        delta_k = r_k + gamma V_{k+1} - V_k,   V_T = 0
        A_k = delta_k + gamma lambda_{k+1} A_{k+1};   returns_k = A_k at value_lambda + V_k

    Chains have a fixed length, so there are no done flags. gae_lambda = 1 gives A_k = R - V_k. One lambda per
    step is the state-dependent lambda of Sutton and Barto (2018, section 12.8): where it is 1, nothing is
    bootstrapped from that step's value.

    Args:
        rewards: (B, T, M) reward after each step.
        values: (B, T, M) value before each step.
        gamma: discount, 1 in the paper: the horizon is fixed.
        gae_lambda: lambda of the policy's advantages, one for all steps or (T,).
        value_lambda: lambda of the value targets.

    Returns:
        advantages (B, T, M) and returns (B, T, M).
    """
    next_values = torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], dim=1)
    deltas = rewards + gamma * next_values - values
    advantages = _discounted_sum(deltas, gamma * gae_lambda)
    returns = _discounted_sum(deltas, gamma * value_lambda) + values
    return advantages, returns


def _discounted_sum(terms: Tensor, discount: float | Tensor) -> Tensor:
    """(B, T, M): s_k = terms_k + discount_{k+1} s_{k+1}."""
    steps = terms.shape[1]
    discounts: Sequence[float | Tensor] = [discount] * steps
    if isinstance(discount, Tensor):
        discounts = discount.to(terms).unbind()
    # What comes before a step's own term has been discounted by the later step.
    carried = torch.zeros_like(terms[:, 0])
    sums = []
    for term, own_discount in zip(reversed(terms.unbind(dim=1)), reversed(discounts), strict=True):
        total = term + carried
        carried = own_discount * total
        sums.append(total)
    return torch.stack(sums[::-1], dim=1)


def normalized_advantages(
    rewards: Tensor,
    values: Tensor,
    reward_mean: Tensor,
    reward_std: Tensor,
    weights: Tensor,
    *,
    mask: Tensor | None = None,
    combination: str = "sum_normalized",
    conditions: Sequence[RewardCondition] = (),
    gamma: float = 1.0,
    gae_lambda: float | Tensor = 1.0,
    value_lambda: float = 1.0,
    advantage_clip: float = 10.0,
    target_clip: float = 5.0,
    all_reduce: Callable[[Tensor], object] | None = None,
) -> NormalizedAdvantages:
    """Advantages of all rewards together, and value targets, from raw rewards and values.

        r = (R - mean_R) / std_R;   A_m, targets_m = gae(r_m, V_m)
        A = sum_m w_m A_m / std(A_m)                                 "sum_normalized"
        advantages = clip( (A - mean(A)) / std(A) )                  over all trajectories, steps and ranks

    Args:
        rewards: (B, M) raw rewards of the trajectories, or (B, T, M) after each step.
        values: (B, T, M) of the critic before each step, in units of the standardised rewards; under
            "scalarized" (B, T, 1).
        reward_mean: (M,) of the raw rewards.
        reward_std: (M,) of the raw rewards.
        weights: (M,) of the rewards.
        mask: (B,) bool, trajectories that count. None: all.
        combination: "sum_normalized", "sum" (A = sum_m w_m A_m) or "scalarized" (r = sum_m w_m r_m).
        conditions: rewards that count as their mean where another one is below a threshold.
        gamma: discount.
        gae_lambda: lambda of the policy's advantages, one for all steps or (T,).
        value_lambda: lambda of the value targets.
        advantage_clip: bound of the normalised advantages.
        target_clip: bound of the value targets.
        all_reduce: sums a tensor over all ranks, in place. None: there is one rank.
    """
    dtype = arithmetic_dtype(values)
    standardized = _standardized_rewards(rewards, values, reward_mean, reward_std, conditions)
    if combination == "scalarized":
        standardized = (weights * standardized).sum(dim=-1, keepdim=True)
        weights = torch.ones_like(weights[:1])
    raw, returns = gae(
        standardized, values.to(dtype), gamma=gamma, gae_lambda=gae_lambda, value_lambda=value_lambda
    )
    sums = advantage_sums(raw, mask)
    if all_reduce is not None:
        all_reduce(sums)
    center, scale = combination_of(sums, weights, normalize_heads=combination == "sum_normalized")
    combined = (scale * (raw - center)).sum(dim=-1).clamp(-advantage_clip, advantage_clip)
    if mask is not None:
        combined = torch.where(mask[:, None], combined, 0.0)
    return NormalizedAdvantages(combined.to(dtype), raw, returns.clamp(-target_clip, target_clip))


def _standardized_rewards(
    rewards: Tensor, values: Tensor, mean: Tensor, std: Tensor, conditions: Sequence[RewardCondition]
) -> Tensor:
    """(B, T, M): each step's reward over std; the mean is that of the sum, so it leaves at the last step."""
    rewards = gated_rewards(rewards, mean, conditions)
    if rewards.ndim == 2:
        earlier = rewards.new_zeros(values.shape[0], values.shape[1] - 1, rewards.shape[1])
        return torch.cat([earlier, ((rewards - mean) / std)[:, None]], dim=1)
    return torch.cat([rewards[:, :-1] / std, (rewards[:, -1:] - mean) / std], dim=1)


def gated_rewards(rewards: Tensor, mean: Tensor, conditions: Sequence[RewardCondition]) -> Tensor:
    """Rewards (B, M) of which an easy one is its mean, 0 once standardised, where its hard one does not pass.

        R_easy <- R_easy  if R_hard >= threshold  else  mean_easy          each by the raw R_hard

    A raw 0 would be the best there is of a reward whose range is negative. `mean` is (M,).
    """
    if not conditions:
        return rewards
    gated = list(rewards.unbind(dim=1))
    for condition in conditions:
        passed = rewards[:, condition.on] >= condition.threshold
        gated[condition.reward] = torch.where(passed, rewards[:, condition.reward], mean[condition.reward])
    return torch.stack(gated, dim=1)


def advantage_sums(raw: Tensor, mask: Tensor | None = None) -> Tensor:
    """Sums (1 + M + M^2,) float64 that normalisation needs of advantages (B, T, M): n, sum A_m, sum A_i A_j.

    Those of parts and of ranks add up to those of the whole. `mask` is (B,) bool; None: all count.
    """
    wide = raw.double()
    if mask is not None:
        wide = torch.where(mask[:, None, None], wide, 0.0)
    flat = wide.flatten(0, 1)
    rows = raw.new_full((), len(raw), dtype=torch.float64) if mask is None else mask.sum().double()
    return torch.cat([(rows * raw.shape[1])[None], flat.sum(dim=0), (flat.mT @ flat).flatten()])


def combination_of(sums: Tensor, weights: Tensor, *, normalize_heads: bool) -> tuple[Tensor, Tensor]:
    """Center (M,) and scale (M,) with which sum_m scale_m (A_m - center_m) has mean 0 and deviation 1.

        scale_m = k_m / std(sum_m k_m A_m),   k_m = w_m / std(A_m)  or  w_m

    A head that does not vary has scale 0, and so have all when their sum does not vary.
    """
    heads = len(weights)
    count, first, second = sums[0], sums[1 : 1 + heads], sums[1 + heads :].view(heads, heads)
    center = first / count.clamp(min=1)
    covariance = (second - count * center[:, None] * center) / (count - 1).clamp(min=1)
    mean_squares = second / count.clamp(min=1)
    gains = weights.double()
    if normalize_heads:
        gains = gains * _inverse_std(covariance.diagonal(), mean_squares.diagonal())
    variance, mean_square = gains @ covariance @ gains, gains.abs() @ mean_squares.abs() @ gains.abs()
    return center, gains * _inverse_std(variance, mean_square)


def _inverse_std(variance: Tensor, mean_square: Tensor) -> Tensor:
    """1 / sqrt(variance); 0 where the variance is rounding of the mean square."""
    constant = variance <= ROUNDING * mean_square
    return torch.where(constant, 0.0, torch.where(constant, 1.0, variance).rsqrt())
