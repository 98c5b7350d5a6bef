"""The advantage pipeline in C++."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lacfast import _C
from lacfast.ops.cpu.addresses import DTYPE_CODES, address


def sums_arguments(
    rewards: Tensor,
    values: Tensor,
    reward_mean: Tensor,
    reward_std: Tensor,
    weights: Tensor,
    mask: Tensor | None,
    scalarized: bool,
    conditions_on: list[int],
    thresholds: list[float],
    gamma: float,
    gae_lambda: float,
    value_lambda: float,
    target_clip: float,
    raw: Tensor,
    targets: Tensor,
    sums: Tensor,
) -> tuple[Any, ...]:
    """What the C++ and the CUDA bindings of advantage_sums take first, in their order."""
    rows, steps, heads = values.shape
    return (
        rows,
        steps,
        rewards.shape[-1],
        heads,
        rewards.ndim == 3,
        scalarized,
        DTYPE_CODES[values.dtype],
        gamma,
        gae_lambda,
        value_lambda,
        target_clip,
        conditions_on,
        thresholds,
        rewards.data_ptr(),
        values.data_ptr(),
        reward_mean.data_ptr(),
        reward_std.data_ptr(),
        weights.data_ptr(),
        address(mask),
        raw.data_ptr(),
        targets.data_ptr(),
        sums.data_ptr(),
    )


def apply_arguments(
    raw: Tensor,
    weights: Tensor,
    mask: Tensor | None,
    sums: Tensor,
    scalarized: bool,
    normalize_heads: bool,
    advantage_clip: float,
    advantages: Tensor,
) -> tuple[Any, ...]:
    """What the C++ and the CUDA bindings of advantage_apply take first; sums (S,) or (P, S) in P parts."""
    rows, steps, heads = raw.shape
    return (
        rows,
        steps,
        heads,
        scalarized,
        normalize_heads,
        DTYPE_CODES[raw.dtype],
        advantage_clip,
        raw.data_ptr(),
        weights.data_ptr(),
        address(mask),
        sums.data_ptr(),
        sums.shape[0] if sums.ndim == 2 else 1,
        advantages.data_ptr(),
    )


def advantage_sums(
    rewards: Tensor,
    values: Tensor,
    reward_mean: Tensor,
    reward_std: Tensor,
    weights: Tensor,
    mask: Tensor | None,
    scalarized: bool,
    conditions_on: list[int],
    thresholds: list[float],
    gamma: float,
    gae_lambda: float,
    value_lambda: float,
    target_clip: float,
    raw: Tensor,
    targets: Tensor,
    sums: Tensor,
) -> None:
    arguments = sums_arguments(
        rewards,
        values,
        reward_mean,
        reward_std,
        weights,
        mask,
        scalarized,
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
    _C.advantage_sums(*arguments)


def advantage_apply(
    raw: Tensor,
    weights: Tensor,
    mask: Tensor | None,
    sums: Tensor,
    scalarized: bool,
    normalize_heads: bool,
    advantage_clip: float,
    advantages: Tensor,
) -> None:
    _C.advantage_apply(
        *apply_arguments(raw, weights, mask, sums, scalarized, normalize_heads, advantage_clip, advantages)
    )


def normalized_advantages(
    rewards: Tensor,
    values: Tensor,
    reward_mean: Tensor,
    reward_std: Tensor,
    weights: Tensor,
    mask: Tensor | None,
    scalarized: bool,
    conditions_on: list[int],
    thresholds: list[float],
    gamma: float,
    gae_lambda: float,
    value_lambda: float,
    target_clip: float,
    normalize_heads: bool,
    advantage_clip: float,
    raw: Tensor,
    targets: Tensor,
    advantages: Tensor,
) -> None:
    heads = values.shape[2]
    sums = torch.empty(1 + heads + heads * heads, dtype=torch.float64)
    advantage_sums(
        rewards,
        values,
        reward_mean,
        reward_std,
        weights,
        mask,
        scalarized,
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
    advantage_apply(raw, weights, mask, sums, scalarized, normalize_heads, advantage_clip, advantages)
