"""gae: advantages and returns of all chains in one pass."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lacfast import reference
from lacfast.ops.checks import check_first, check_operand
from lacfast.ops.op import Op, Sized


def gae(
    rewards: Tensor,
    values: Tensor,
    *,
    gamma: float = 1.0,
    gae_lambda: float | Tensor = 1.0,
    value_lambda: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (arXiv 1506.02438, eq. 16), one chain per trajectory and reward.

        delta_k = r_k + gamma V_{k+1} - V_k,   V_T = 0
        A_k = delta_k + gamma lambda A_{k+1};   returns_k = A_k at value_lambda + V_k

    Half-precision inputs are computed in float32 and returned in their own dtype; gradients flow to both.

    Args:
        rewards: (B, T, M) reward after each step.
        values: (B, T, M) value before each step, in the dtype of `rewards`.
        gamma: discount per step, 0 to 1.
        gae_lambda: of the policy's advantages, 0 to 1, or (T,) of each step's value (see reference.gae). One
            per step runs the reference on every device.
        value_lambda: of the value targets, 0 to 1.

    Returns:
        advantages (B, T, M) and returns (B, T, M).

    Raises:
        ValueError: a shape, dtype, device or memory order that does not fit.
    """
    if rewards.ndim != 3 or rewards.numel() == 0:
        raise ValueError(f"rewards has shape {tuple(rewards.shape)}; it must be (B, T, M), none of them 0")
    check_first("rewards", rewards)
    check_operand("values", values, "rewards", rewards, rewards.shape, (rewards.dtype,))
    chosen = GAE.chosen(rewards)
    if isinstance(gae_lambda, Tensor) or chosen == "reference":
        return reference.gae(rewards, values, gamma=gamma, gae_lambda=gae_lambda, value_lambda=value_lambda)
    advantages, returns = GAE(chosen, Gae(rewards, values, gamma, gae_lambda, value_lambda))
    return advantages, returns


class Gae(NamedTuple):
    rewards: Sized
    values: Tensor
    gamma: float
    gae_lambda: float
    value_lambda: float


class GaeOutputs(NamedTuple):
    advantages: Tensor
    returns: Tensor


def _allocate(inputs: Gae) -> GaeOutputs:
    return GaeOutputs(torch.empty_like(inputs.rewards), torch.empty_like(inputs.values))


GAE = Op(
    "gae",
    Gae,
    GaeOutputs,
    _allocate,
    cuda=True,
    gradients=("rewards", "values"),
    keeps=("rewards", "values"),
    all_gradients=True,
)
