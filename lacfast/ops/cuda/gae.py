"""gae in CUDA C++."""

from __future__ import annotations

from torch import Tensor

from lacfast import _C
from lacfast.ops.cpu.gae import gae_arguments
from lacfast.ops.cuda.stream import current_stream


def gae(
    rewards: Tensor,
    values: Tensor,
    gamma: float,
    gae_lambda: float,
    value_lambda: float,
    advantages: Tensor,
    returns: Tensor,
) -> None:
    arguments = gae_arguments(rewards, values, gamma, gae_lambda, value_lambda, advantages, returns)
    _C.cuda_gae(*arguments, current_stream(rewards))


def gae_backward(
    grad_advantages: Tensor,
    grad_returns: Tensor,
    gamma: float,
    gae_lambda: float,
    value_lambda: float,
    grad_rewards: Tensor,
    grad_values: Tensor,
) -> None:
    arguments = gae_arguments(
        grad_advantages, grad_returns, gamma, gae_lambda, value_lambda, grad_rewards, grad_values
    )
    _C.cuda_gae_backward(*arguments, current_stream(grad_advantages))
