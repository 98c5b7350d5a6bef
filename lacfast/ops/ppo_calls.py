"""The calls behind ppo_loss: kernels, autograd, and registration with torch's dispatcher."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lacfast.ops.backend import choose, launch

# What the loss and its gradient both read: outputs, transition, noise or its key. The kernels' order.
NUM_SHARED = 8
# Columns: log_ratio, kl_old, kl_ref, clipped | count, three sums, clipped from above, from below |
# a row's share of the loss, and its derivatives by log_ratio and by kl_ref.
ROW_COLUMNS, STEP_COLUMNS, SHARE_COLUMNS = 4, 6, 3

Outputs = tuple[Tensor, Tensor, Tensor, Tensor]
"""loss (), rows (B, 4), step_sums (T, 6), shares (B, 3)."""


def _empty_outputs(coefficients: Tensor, steps: Tensor) -> Outputs:
    batch = steps.shape[0]
    return (
        coefficients.new_empty(()),
        coefficients.new_empty((batch, ROW_COLUMNS)),
        coefficients.new_empty((coefficients.shape[0], STEP_COLUMNS)),
        coefficients.new_empty((batch, SHARE_COLUMNS)),
    )


def outputs_of(chosen: str, *arguments: Any) -> Outputs:
    """Loss and statistics from the arguments of the registered op, in its order."""
    model_output, _, _, coefficients, steps = arguments[:5]
    outputs = _empty_outputs(coefficients, steps)
    launch(chosen, "ppo_loss_forward", model_output, *arguments, *outputs)
    return outputs


def _gradient_of(chosen: str, *arguments: Any) -> Tensor:
    model_output = arguments[0]
    grad_model_output = torch.empty_like(model_output)
    launch(chosen, "ppo_loss_backward", model_output, *arguments, grad_model_output)
    return grad_model_output


def _save(ctx: Any, inputs: Any, output: Outputs) -> None:
    kl_gains, scale, is_normalized = inputs[12:15]
    ctx.save_for_backward(*inputs[:NUM_SHARED], kl_gains, output[3])
    ctx.settings = (scale, is_normalized)
    ctx.mark_non_differentiable(*output[1:])
    # Else autograd makes zeros for the statistics.
    ctx.set_materialize_grads(False)


def _backward_arguments(ctx: Any, grad_loss: Tensor) -> tuple[Any, ...]:
    *shared_and_gains, shares = ctx.saved_tensors
    return *shared_and_gains, *ctx.settings, shares, grad_loss


class PPOLoss(torch.autograd.Function):
    """The direct path. Autograd looks at each of its arguments in turn, so all but one come in a tuple."""

    @staticmethod
    def forward(ctx: Any, model_output: Tensor, chosen: str, others: tuple[Any, ...]) -> Outputs:
        outputs = outputs_of(chosen, model_output, *others)
        _save(ctx, (model_output, *others), outputs)
        ctx.chosen = chosen
        return outputs

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        if grads[0] is None:
            return None, None, None
        return _gradient_of(ctx.chosen, *_backward_arguments(ctx, grads[0])), None, None


@torch.library.custom_op("lacfast::ppo_loss", mutates_args=())
def ppo_loss_op(
    model_output: Tensor,
    old_model_output: Tensor,
    reference_output: Tensor | None,
    coefficients: Tensor,
    steps: Tensor,
    noise: Tensor | None,
    seed: Tensor | None,
    sample_ids: Tensor | None,
    advantages: Tensor,
    weights: Tensor | None,
    step_weights: Tensor | None,
    mask: Tensor | None,
    kl_gains: Tensor | None,
    scale: float,
    is_normalized: bool,
    clip_low: float,
    clip_high: float,
    dual_clip: float,
    kl_threshold: float,
    kl_weight: float,
) -> Outputs:
    shared = (model_output, old_model_output, reference_output, coefficients, steps, noise, seed, sample_ids)
    per_pair = (advantages, weights, step_weights, mask, kl_gains)
    settings = (scale, is_normalized, clip_low, clip_high, dual_clip, kl_threshold, kl_weight)
    chosen = choose("ppo_loss_forward", model_output.device.type, model_output.dtype)
    return outputs_of(chosen, *shared, *per_pair, *settings)


@ppo_loss_op.register_fake
def _(
    model_output: Tensor, old: Tensor, reference: Any, coefficients: Tensor, steps: Tensor, *_: Any
) -> Outputs:
    return _empty_outputs(coefficients, steps)


@torch.library.custom_op("lacfast::ppo_loss_backward", mutates_args=())
def _ppo_loss_backward_op(
    model_output: Tensor,
    old_model_output: Tensor,
    reference_output: Tensor | None,
    coefficients: Tensor,
    steps: Tensor,
    noise: Tensor | None,
    seed: Tensor | None,
    sample_ids: Tensor | None,
    kl_gains: Tensor | None,
    scale: float,
    is_normalized: bool,
    shares: Tensor,
    grad_loss: Tensor,
) -> Tensor:
    shared = (model_output, old_model_output, reference_output, coefficients, steps, noise, seed, sample_ids)
    chosen = choose("ppo_loss_backward", model_output.device.type, model_output.dtype)
    return _gradient_of(chosen, *shared, kl_gains, scale, is_normalized, shares, grad_loss)


@_ppo_loss_backward_op.register_fake
def _(model_output: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(model_output)


def _ppo_loss_op_backward(ctx: Any, *grads: Tensor | None) -> Any:
    if grads[0] is None:
        return (None,) * 20
    return _ppo_loss_backward_op(*_backward_arguments(ctx, grads[0])), *([None] * 19)


ppo_loss_op.register_autograd(_ppo_loss_op_backward, setup_context=_save)
