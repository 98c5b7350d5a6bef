"""gae in C++."""

from __future__ import annotations

from torch import Tensor

from lacfast import _C
from lacfast.ops.cpu.addresses import DTYPE_CODES


def gae_arguments(
    first_input: Tensor,
    second_input: Tensor,
    gamma: float,
    gae_lambda: float,
    value_lambda: float,
    first_output: Tensor,
    second_output: Tensor,
) -> tuple[int, int, int, int, float, float, float, int, int, int, int]:
    """What the C++ and the CUDA bindings of gae and its backward take, in their order."""
    rows, steps, heads = first_input.shape
    return (
        rows,
        steps,
        heads,
        DTYPE_CODES[first_input.dtype],
        gamma,
        gae_lambda,
        value_lambda,
        first_input.data_ptr(),
        second_input.data_ptr(),
        first_output.data_ptr(),
        second_output.data_ptr(),
    )


def gae(
    rewards: Tensor,
    values: Tensor,
    gamma: float,
    gae_lambda: float,
    value_lambda: float,
    advantages: Tensor,
    returns: Tensor,
) -> None:
    _C.gae(*gae_arguments(rewards, values, gamma, gae_lambda, value_lambda, advantages, returns))


def gae_backward(
    grad_advantages: Tensor,
    grad_returns: Tensor,
    gamma: float,
    gae_lambda: float,
    value_lambda: float,
    grad_rewards: Tensor,
    grad_values: Tensor,
) -> None:
    _C.gae_backward(
        *gae_arguments(
            grad_advantages, grad_returns, gamma, gae_lambda, value_lambda, grad_rewards, grad_values
        )
    )
