"""gae: advantages and returns of all chains in one pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lacfast import reference
from lacfast.ops.backend import choose, launch, through_dispatcher
from lacfast.ops.checks import FLOATS, check_operand


def gae(
    rewards: Tensor, values: Tensor, *, gamma: float = 1.0, gae_lambda: float = 1.0, value_lambda: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (arXiv 1506.02438, eq. 16), one chain per trajectory and reward.

        delta_k = r_k + gamma V_{k+1} - V_k,   V_T = 0
        A_k = delta_k + gamma lambda A_{k+1};   returns_k = A_k at value_lambda + V_k

    Half-precision inputs are computed in float32 and returned in their own dtype; gradients flow to both.

    Args:
        rewards: (B, T, M) reward after each step.
        values: (B, T, M) value before each step, in the dtype of `rewards`.
        gamma: discount per step, 0 to 1.
        gae_lambda: of the policy's advantages, 0 to 1.
        value_lambda: of the value targets, 0 to 1.

    Returns:
        advantages (B, T, M) and returns (B, T, M).

    Raises:
        ValueError: a shape, dtype, device or memory order that does not fit.
    """
    if rewards.ndim != 3 or 0 in rewards.shape:
        raise ValueError(f"rewards has shape {tuple(rewards.shape)}; it must be (B, T, M), none of them 0")
    check_operand("rewards", rewards, "rewards", rewards, rewards.shape, FLOATS)
    check_operand("values", values, "rewards", rewards, rewards.shape, (rewards.dtype,))
    chosen = choose("gae", rewards.device.type, rewards.dtype)
    if chosen == "reference":
        return reference.gae(rewards, values, gamma=gamma, gae_lambda=gae_lambda, value_lambda=value_lambda)
    if through_dispatcher(rewards):
        advantages, returns = _gae_op(rewards, values, gamma, gae_lambda, value_lambda)
        return advantages, returns
    if torch.is_grad_enabled() and (rewards.requires_grad or values.requires_grad):
        advantages, returns = _Gae.apply(  # type: ignore[no-untyped-call]
            rewards, values, gamma, gae_lambda, value_lambda, chosen
        )
        return advantages, returns
    return _forward(chosen, rewards, values, gamma, gae_lambda, value_lambda)


def _forward(
    chosen: str, rewards: Tensor, values: Tensor, gamma: float, gae_lambda: float, value_lambda: float
) -> tuple[Tensor, Tensor]:
    advantages, returns = torch.empty_like(rewards), torch.empty_like(values)
    launch(chosen, "gae", rewards, rewards, values, gamma, gae_lambda, value_lambda, advantages, returns)
    return advantages, returns


def _backward(
    chosen: str,
    grad_advantages: Tensor,
    grad_returns: Tensor,
    gamma: float,
    gae_lambda: float,
    value_lambda: float,
) -> tuple[Tensor, Tensor]:
    grad_advantages, grad_returns = grad_advantages.contiguous(), grad_returns.contiguous()
    grad_rewards, grad_values = torch.empty_like(grad_advantages), torch.empty_like(grad_returns)
    launch(
        chosen,
        "gae_backward",
        grad_advantages,
        grad_advantages,
        grad_returns,
        gamma,
        gae_lambda,
        value_lambda,
        grad_rewards,
        grad_values,
    )
    return grad_rewards, grad_values


class _Gae(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rewards: Tensor,
        values: Tensor,
        gamma: float,
        gae_lambda: float,
        value_lambda: float,
        chosen: str,
    ) -> tuple[Tensor, Tensor]:
        ctx.settings = (gamma, gae_lambda, value_lambda)
        ctx.chosen = chosen
        return _forward(chosen, rewards, values, gamma, gae_lambda, value_lambda)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        grad_advantages, grad_returns = grads
        gradients = _backward(ctx.chosen, grad_advantages, grad_returns, *ctx.settings)
        return (*gradients, None, None, None, None)


@torch.library.custom_op("lacfast::gae", mutates_args=())
def _gae_op(
    rewards: Tensor, values: Tensor, gamma: float, gae_lambda: float, value_lambda: float
) -> tuple[Tensor, Tensor]:
    return _forward(
        choose("gae", rewards.device.type, rewards.dtype), rewards, values, gamma, gae_lambda, value_lambda
    )


@torch.library.custom_op("lacfast::gae_backward", mutates_args=())
def _gae_backward_op(
    grad_advantages: Tensor, grad_returns: Tensor, gamma: float, gae_lambda: float, value_lambda: float
) -> tuple[Tensor, Tensor]:
    chosen = choose("gae_backward", grad_advantages.device.type, grad_advantages.dtype)
    return _backward(chosen, grad_advantages, grad_returns, gamma, gae_lambda, value_lambda)


@_gae_op.register_fake
@_gae_backward_op.register_fake
def _(first: Tensor, second: Tensor, *settings: float) -> tuple[Tensor, Tensor]:
    # Contiguous as the kernels write it, whatever an incoming gradient's strides are.
    return first.new_empty(first.shape), second.new_empty(second.shape)


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.settings = inputs[2:]


def _op_backward(ctx: Any, grad_advantages: Tensor, grad_returns: Tensor) -> Any:
    return (*_gae_backward_op(grad_advantages, grad_returns, *ctx.settings), None, None, None)


_gae_op.register_autograd(_op_backward, setup_context=_setup_context)
