"""normalized_advantages: from raw rewards and values to what the update learns from, in two passes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lacfast import reference
from lacfast.config.checks import unknown
from lacfast.ops.backend import add_kernel, launch, through_dispatcher
from lacfast.ops.checks import arithmetic_dtype, check_first, check_operand, once_per_layout
from lacfast.ops.op import Op, Sized, words_format
from lacfast.records import NormalizedAdvantages, RewardCondition

COMBINATIONS = ("sum_normalized", "sum", "scalarized")
MAX_REWARDS = 16


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
    """Rewards in units of their running deviation, GAE per head, one normalised advantage per step.

        r = (R - reward_mean) / reward_std;   A_m, targets_m = gae(r_m, V_m)
        A = sum_m w_m A_m / std(A_m)                                    "sum_normalized"
        A = sum_m w_m A_m                                               "sum"
        one head of values, r = sum_m w_m r_m, A = gae(r, V)            "scalarized"
        advantages = clip( (A - mean(A)) / std(A) )      over all trajectories, steps and ranks

    The sum of heads each in its own deviation is ours; separate heads, normalisation and bounds are those of
    arXiv 2605.27736. For a constrained objective let the weights be Lagrange multipliers
    (`advantages.LagrangeMultipliers`). std is the sample's (n - 1); what does not vary counts 0.
    The maths is float32 (float64 for float64 values) also under autocast, moments are float64 and added in an
    order that depends on the shape alone. No gradient: advantages and targets are constants of the update.

    Args:
        rewards: (B, M) at the end of each trajectory, or (B, T, M) after each step, raw, in the maths' dtype.
        values: (B, T, M) before each step, standardised, one head for each reward; (B, T, 1) when
            scalarized, and so are the results' and the moments' M.
        reward_mean: (M,) running mean of a trajectory's summed reward, like rewards.
        reward_std: (M,) its standard deviation, > 0.
        weights: (M,) w, like rewards.
        mask: (B,) bool, False for trajectories that only pad the batch. None: all count.
        combination: "sum_normalized", "sum" or "scalarized".
        conditions: easy rewards that count as their mean where a hard one fails; at most one for each reward.
        gamma: discount per step, 0 to 1.
        gae_lambda: of the policy's advantages, 0 to 1, or (T,) of each step's value (see reference.gae). One
            per step runs the reference on every device.
        value_lambda: of the value targets, 0 to 1.
        advantage_clip: bound of the advantages, > 0.
        target_clip: bound of the targets, > 0.
        all_reduce: adds its argument, (1 + M + M^2,) float64 moments, over all ranks in place, so that every
            rank normalises alike; for example torch.distributed.all_reduce. None: one rank.

    Returns:
        advantages (B, T), raw (B, T, M) and targets (B, T, M).

    Raises:
        ValueError: a setting, shape, dtype, device or memory order that does not fit.
    """
    _check(rewards, values, reward_mean, reward_std, weights, mask, combination=combination)
    conditions_on, thresholds = _condition_lists(rewards, conditions)
    chosen = ADVANTAGE_SUMS.chosen(values)
    if isinstance(gae_lambda, Tensor) or chosen == "reference":
        with torch.no_grad():
            return reference.normalized_advantages(
                rewards,
                values,
                reward_mean,
                reward_std,
                weights,
                mask=mask,
                combination=combination,
                conditions=conditions,
                gamma=gamma,
                gae_lambda=gae_lambda,
                value_lambda=value_lambda,
                advantage_clip=advantage_clip,
                target_clip=target_clip,
                all_reduce=all_reduce,
            )
    scalarized = combination == "scalarized"
    inputs = AdvantageSums(
        *(rewards, values, reward_mean, reward_std, weights, mask, scalarized, conditions_on, thresholds),
        *(gamma, gae_lambda, value_lambda, target_clip),
    )
    normalize_heads = combination == "sum_normalized"
    if all_reduce is None and chosen == "cpu" and not through_dispatcher(values):
        return _of_one_rank(inputs, Normalization(normalize_heads, advantage_clip))
    raw, targets, sums = ADVANTAGE_SUMS(chosen, inputs)
    if all_reduce is not None:
        sums = sums.sum(dim=0)
        all_reduce(sums)
        sums = sums[None]
    apply = AdvantageApply(raw, weights, mask, sums, scalarized, normalize_heads, advantage_clip)
    return NormalizedAdvantages(ADVANTAGE_APPLY(chosen, apply).advantages, raw, targets)


@once_per_layout
def _check(
    rewards: Tensor,
    values: Tensor,
    reward_mean: Tensor,
    reward_std: Tensor,
    weights: Tensor,
    mask: Tensor | None,
    *,
    combination: str,
) -> None:
    if combination not in COMBINATIONS:
        raise unknown("combination", combination, COMBINATIONS)
    if values.ndim != 3 or values.numel() == 0:
        raise ValueError(f"values has shape {tuple(values.shape)}; it must be (B, T, M), none of them 0")
    check_first("values", values)
    num_rewards = rewards.shape[-1] if rewards.ndim in (2, 3) else 0
    if not 1 <= num_rewards <= MAX_REWARDS:
        raise ValueError(
            f"rewards has shape {tuple(rewards.shape)}; "
            f"it must be (B, M) or (B, T, M) with 1 to {MAX_REWARDS} rewards"
        )
    heads = 1 if combination == "scalarized" else num_rewards
    if values.shape[2] != heads:
        raise ValueError(
            f"values has {values.shape[2]} heads for {num_rewards} rewards; {combination!r} needs {heads}"
        )
    maths = (arithmetic_dtype(values),)
    leading = values.shape[: rewards.ndim - 1]
    check_operand("rewards", rewards, "values", values, (*leading, num_rewards), maths)
    for name, tensor in (("reward_mean", reward_mean), ("reward_std", reward_std), ("weights", weights)):
        check_operand(name, tensor, "values", values, (num_rewards,), maths)
    if mask is not None:
        check_operand("mask", mask, "values", values, values.shape[:1], (torch.bool,))


def _condition_lists(rewards: Tensor, conditions: Sequence[RewardCondition]) -> tuple[list[int], list[float]]:
    """Per reward the index that it depends on, -1 for none, and the threshold."""
    num_rewards = rewards.shape[-1]
    on, thresholds = [-1] * num_rewards, [0.0] * num_rewards
    if conditions and rewards.ndim == 3:
        raise ValueError(
            "conditions compare a trajectory's reward; with rewards (B, T, M) pass their sum (B, M)"
        )
    for condition in conditions:
        if not (0 <= condition.reward < num_rewards and 0 <= condition.on < num_rewards):
            raise ValueError(f"{condition} names a reward outside 0 to {num_rewards - 1}")
        if on[condition.reward] >= 0:
            raise ValueError(f"{condition} is the second condition of reward {condition.reward}; give one")
        on[condition.reward], thresholds[condition.reward] = condition.on, condition.threshold
    return on, thresholds


def _of_one_rank(inputs: AdvantageSums, settings: Normalization) -> NormalizedAdvantages:
    """Both passes in one call: a second op costs a small rollout as much as the arithmetic of both."""
    batch, steps, heads = inputs.values.shape
    # Of the weights, which have the maths' dtype: to name one takes torch as long as to allocate.
    empty = inputs.weights.new_empty
    outputs = NormalizationOutputs(
        empty(batch, steps), empty(batch, steps, heads), empty(batch, steps, heads)
    )
    launch("cpu", "normalized_advantages", inputs.values, inputs, settings, outputs)
    return NormalizedAdvantages(*outputs)


class AdvantageSums(NamedTuple):
    rewards: Sized
    values: Sized
    reward_mean: Tensor
    reward_std: Tensor
    weights: Sized
    mask: Tensor | None
    scalarized: bool
    conditions_on: list[int]
    thresholds: list[float]
    gamma: float
    gae_lambda: float
    value_lambda: float
    target_clip: float


class AdvantageSumsOutputs(NamedTuple):
    raw: Tensor
    targets: Tensor
    sums: Sized
    """(P, 1 + M + M^2) float64: the moments in P parts, each n, sum A_m, sum A_i A_j."""


class AdvantageApply(NamedTuple):
    raw: Sized
    weights: Tensor
    mask: Tensor | None
    sums: Sized
    scalarized: bool
    normalize_heads: bool
    advantage_clip: float


class AdvantageApplyOutputs(NamedTuple):
    advantages: Tensor


class Normalization(NamedTuple):
    normalize_heads: bool
    advantage_clip: float


class NormalizationOutputs(NamedTuple):
    advantages: Tensor
    raw: Sized
    targets: Tensor


def _parts(values: Tensor) -> int:
    """Rows of moments: one, or one for each block of the CUDA kernel."""
    return 1 if values.is_cpu else cuda_blocks(values)


def cuda_blocks(values: Tensor) -> int:
    """Blocks of two warps, which own whole trajectories, 32 chains at most: by the shape alone, as sums are.

    Every block of the second launch reads the rows of all, so there are not too many.
    """
    batch, _, heads = values.shape
    warps = -(-batch // (32 // heads))
    return min(-(-warps // 2), 256)


def _sums(inputs: AdvantageSums) -> AdvantageSumsOutputs:
    values = inputs.values
    heads = values.shape[2]
    raw = torch.empty_like(values, dtype=arithmetic_dtype(values))
    sums = values.new_empty(_parts(values), 1 + heads + heads * heads, dtype=torch.float64)
    return AdvantageSumsOutputs(raw, torch.empty_like(raw), sums)


def _advantages(inputs: AdvantageApply) -> AdvantageApplyOutputs:
    batch, steps, _ = inputs.raw.shape
    return AdvantageApplyOutputs(inputs.raw.new_empty(batch, steps))


ADVANTAGE_SUMS = Op("advantage_sums", AdvantageSums, AdvantageSumsOutputs, _sums, cuda=True)
ADVANTAGE_APPLY = Op("advantage_apply", AdvantageApply, AdvantageApplyOutputs, _advantages, cuda=True)
add_kernel(
    "normalized_advantages",
    [words_format(record) for record in (AdvantageSums, Normalization, NormalizationOutputs)],
)
