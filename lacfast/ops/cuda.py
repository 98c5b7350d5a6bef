"""The CUDA C++ kernels: sequential work that Triton does not express, on torch's current stream."""

from __future__ import annotations

import torch
from torch import Tensor

from lacfast import _C
from lacfast.ops.cpu import DTYPE_CODES


def gae(
    rewards: Tensor,
    values: Tensor,
    gamma: float,
    gae_lambda: float,
    value_lambda: float,
    advantages: Tensor,
    returns: Tensor,
) -> None:
    shape = (*rewards.shape, DTYPE_CODES[rewards.dtype])
    addresses = (rewards.data_ptr(), values.data_ptr(), advantages.data_ptr(), returns.data_ptr())
    stream = torch.cuda.current_stream(rewards.device).cuda_stream
    _C.cuda_gae(*shape, gamma, gae_lambda, value_lambda, *addresses, stream)


def gae_backward(
    grad_advantages: Tensor,
    grad_returns: Tensor,
    gamma: float,
    gae_lambda: float,
    value_lambda: float,
    grad_rewards: Tensor,
    grad_values: Tensor,
) -> None:
    shape = (*grad_advantages.shape, DTYPE_CODES[grad_advantages.dtype])
    addresses = (
        grad_advantages.data_ptr(),
        grad_returns.data_ptr(),
        grad_rewards.data_ptr(),
        grad_values.data_ptr(),
    )
    stream = torch.cuda.current_stream(grad_advantages.device).cuda_stream
    _C.cuda_gae_backward(*shape, gamma, gae_lambda, value_lambda, *addresses, stream)
