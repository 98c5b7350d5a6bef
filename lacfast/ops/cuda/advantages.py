"""The advantage pipeline in CUDA C++: two launches."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lacfast import _C
from lacfast.ops.cpu.advantages import apply_arguments, sums_arguments
from lacfast.ops.cuda.stream import current_stream


def _parts(values: Tensor) -> Tensor:
    """(P, S) room for one row of moments per block of the first launch."""
    rows, _, heads = values.shape
    parts = _C.cuda_advantage_partials(rows, heads)
    return values.new_empty(parts, 1 + heads + heads * heads, dtype=torch.float64)


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
    """Fills sums (S,), or (P, S) part by part."""
    parts = sums if sums.ndim == 2 else _parts(values)
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
        parts,
    )
    on_stream: tuple[Any, ...] = (*arguments, current_stream(values))
    _C.cuda_advantage_sums(*on_stream)
    if sums.ndim == 1:
        torch.sum(parts, dim=0, out=sums)


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
    arguments = apply_arguments(
        raw, weights, mask, sums, scalarized, normalize_heads, advantage_clip, advantages
    )
    on_stream: tuple[Any, ...] = (*arguments, current_stream(raw))
    _C.cuda_advantage_apply(*on_stream)


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
    parts = _parts(values)
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
        parts,
    )
    advantage_apply(raw, weights, mask, parts, scalarized, normalize_heads, advantage_clip, advantages)
