"""normalized_advantages: from raw rewards and values to what the update learns from, in two passes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lacfast import reference
from lacfast.ops.backend import choose, launch, through_dispatcher
from lacfast.ops.checks import FLOATS, arithmetic_dtype, check_operand
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
        values: (B, T, H) before each step, standardised; H = M heads, or 1 when scalarized.
        reward_mean: (M,) running mean of a trajectory's summed reward, like rewards.
        reward_std: (M,) its standard deviation, > 0.
        weights: (M,) w, like rewards.
        mask: (B,) bool, False for trajectories that only pad the batch. None: all count.
        combination: "sum_normalized", "sum" or "scalarized".
        conditions: easy rewards that count as 0 where a hard one fails; at most one for each reward.
        gamma: discount per step, 0 to 1.
        gae_lambda: of the policy's advantages, 0 to 1, or (T,) of each step's value (see reference.gae). One
            per step runs the reference on every device.
        value_lambda: of the value targets, 0 to 1.
        advantage_clip: bound of the advantages, > 0.
        target_clip: bound of the targets, > 0.
        all_reduce: adds its argument, (1 + H + H^2,) float64 moments, over all ranks in place, so that every
            rank normalises alike; for example torch.distributed.all_reduce. None: one rank.

    Returns:
        advantages (B, T), raw (B, T, H) and targets (B, T, H).

    Raises:
        ValueError: a setting, shape, dtype, device or memory order that does not fit.
    """
    _check(rewards, values, reward_mean, reward_std, weights, mask, combination)
    conditions_on, thresholds = _condition_lists(rewards, conditions)
    if isinstance(gae_lambda, Tensor) or (
        choose("normalized_advantages", values.device.type, values.dtype) == "reference"
    ):
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
    inputs = (rewards, values, reward_mean, reward_std, weights, mask)
    settings = (gamma, gae_lambda, value_lambda, target_clip)
    sums_arguments = (*inputs, combination, conditions_on, thresholds, *settings)
    seen = through_dispatcher(values)
    with torch.no_grad():
        if all_reduce is None:
            run = _normalized_advantages_op if seen else _normalized_advantages
            return NormalizedAdvantages(*run(*sums_arguments, advantage_clip))
        raw, targets, sums = (_advantage_sums_op if seen else _advantage_sums)(*sums_arguments)
        all_reduce(sums)
        apply = _advantage_apply_op if seen else _advantage_apply
        return NormalizedAdvantages(
            apply(raw, weights, mask, sums, combination, advantage_clip), raw, targets
        )


def _check(
    rewards: Tensor,
    values: Tensor,
    reward_mean: Tensor,
    reward_std: Tensor,
    weights: Tensor,
    mask: Tensor | None,
    combination: str,
) -> None:
    if combination not in COMBINATIONS:
        raise ValueError(f"unknown combination {combination!r}; known: {', '.join(COMBINATIONS)}")
    if values.ndim != 3 or 0 in values.shape:
        raise ValueError(f"values has shape {tuple(values.shape)}; it must be (B, T, H), none of them 0")
    check_operand("values", values, "values", values, values.shape, FLOATS)
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


def _normalized_advantages(
    rewards: Tensor,
    values: Tensor,
    reward_mean: Tensor,
    reward_std: Tensor,
    weights: Tensor,
    mask: Tensor | None,
    combination: str,
    conditions_on: list[int],
    thresholds: list[float],
    gamma: float,
    gae_lambda: float,
    value_lambda: float,
    target_clip: float,
    advantage_clip: float,
) -> tuple[Tensor, Tensor, Tensor]:
    advantages, raw, targets = _outputs(values)
    launch(
        choose("normalized_advantages", values.device.type, values.dtype),
        "normalized_advantages",
        values,
        rewards,
        values,
        reward_mean,
        reward_std,
        weights,
        mask,
        combination == "scalarized",
        conditions_on,
        thresholds,
        gamma,
        gae_lambda,
        value_lambda,
        target_clip,
        combination == "sum_normalized",
        advantage_clip,
        raw,
        targets,
        advantages,
    )
    return advantages, raw, targets


def _advantage_sums(
    rewards: Tensor,
    values: Tensor,
    reward_mean: Tensor,
    reward_std: Tensor,
    weights: Tensor,
    mask: Tensor | None,
    combination: str,
    conditions_on: list[int],
    thresholds: list[float],
    gamma: float,
    gae_lambda: float,
    value_lambda: float,
    target_clip: float,
) -> tuple[Tensor, Tensor, Tensor]:
    _, raw, targets = _outputs(values)
    sums = _empty_sums(values)
    launch(
        choose("advantage_sums", values.device.type, values.dtype),
        "advantage_sums",
        values,
        rewards,
        values,
        reward_mean,
        reward_std,
        weights,
        mask,
        combination == "scalarized",
        conditions_on,
        thresholds,
        gamma,
        gae_lambda,
        value_lambda,
        target_clip,
        raw,
        targets,
        sums,
    )
    return raw, targets, sums


def _advantage_apply(
    raw: Tensor, weights: Tensor, mask: Tensor | None, sums: Tensor, combination: str, advantage_clip: float
) -> Tensor:
    advantages = raw.new_empty(raw.shape[:2])
    launch(
        choose("advantage_apply", raw.device.type, raw.dtype),
        "advantage_apply",
        raw,
        raw,
        weights,
        mask,
        sums,
        combination == "scalarized",
        combination == "sum_normalized",
        advantage_clip,
        advantages,
    )
    return advantages


def _outputs(values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    dtype = arithmetic_dtype(values)
    raw = values.new_empty(values.shape, dtype=dtype)
    return raw.new_empty(values.shape[:2]), raw, torch.empty_like(raw)


def _empty_sums(values: Tensor) -> Tensor:
    heads = values.shape[2]
    return values.new_empty(1 + heads + heads * heads, dtype=torch.float64)


_normalized_advantages_op = torch.library.custom_op(
    "lacfast::normalized_advantages", _normalized_advantages, mutates_args=()
)
_advantage_sums_op = torch.library.custom_op("lacfast::advantage_sums", _advantage_sums, mutates_args=())
_advantage_apply_op = torch.library.custom_op("lacfast::advantage_apply", _advantage_apply, mutates_args=())


@_normalized_advantages_op.register_fake
def _(rewards: Tensor, values: Tensor, *rest: object) -> tuple[Tensor, Tensor, Tensor]:
    return _outputs(values)


@_advantage_sums_op.register_fake
def _(rewards: Tensor, values: Tensor, *rest: object) -> tuple[Tensor, Tensor, Tensor]:
    return (*_outputs(values)[1:], _empty_sums(values))


@_advantage_apply_op.register_fake
def _(raw: Tensor, *rest: object) -> Tensor:
    return raw.new_empty(raw.shape[:2])
