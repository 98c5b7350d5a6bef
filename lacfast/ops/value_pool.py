"""value_pool: attention of single queries over normalised tokens, in one read of the features."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lacfast import reference
from lacfast.ops.backend import choose, launch, through_dispatcher
from lacfast.ops.checks import FLOATS, arithmetic_dtype, check_operand

TRITON_MAX_DIM = 4096
"""Features of a token that the registers of one program hold."""

_Saved = tuple[Tensor, Tensor, Tensor]
_Grads = tuple[Tensor | None, Tensor | None, Tensor | None]


def value_pool(
    features: Tensor, query: Tensor, norm_weight: Tensor | None = None, *, eps: float = 1e-6
) -> Tensor:
    """Attention of single queries over normalised tokens.

    The key projection is folded into the query, the value projection into the caller.

        n_l = RMSNorm(features_l) norm_weight;   out_h = sum_l softmax_l(query_h . n_l) n_l

    Each tensor is read in its own dtype and the maths is float32 (float64 for float64 features), inside
    autocast too. Gradients flow to all three tensors. Where the features need none, backward writes nothing
    of their size; where nothing needs one, forward keeps nothing.

    Args:
        features: (B, L, D) tokens.
        query: (B, H, D), the caller's scale folded in.
        norm_weight: (D,), or None for 1.
        eps: of the RMSNorm.

    Returns:
        (B, H, D) in the query's dtype.

    Raises:
        ValueError: a shape, dtype, device or memory order that does not fit.
    """
    _check(features, query, norm_weight)
    chosen = choose("value_pool_forward", features.device.type, features.dtype)
    if chosen == "reference":
        # Autocast would round the scores to its own dtype.
        with torch.autocast(features.device.type, enabled=False):
            return reference.value_pool(features, query, norm_weight, eps=eps)
    if chosen == "triton" and features.shape[2] > TRITON_MAX_DIM:
        raise ValueError(
            f"features has {features.shape[2]} features per token; the Triton kernel takes at most "
            f"{TRITON_MAX_DIM}: call lacfast.reference.value_pool"
        )
    trained = features.requires_grad or query.requires_grad
    trained = trained or (norm_weight is not None and norm_weight.requires_grad)
    trained = trained and torch.is_grad_enabled()
    out: Tensor
    if through_dispatcher(features):
        out = _value_pool_op(features, query, norm_weight, eps, trained)[0]
    elif trained:
        out = _ValuePool.apply(features, query, norm_weight, eps, chosen)  # type: ignore[no-untyped-call]
    else:
        out = _forward(chosen, features, query, norm_weight, eps, None)
    return out


def _check(features: Tensor, query: Tensor, norm_weight: Tensor | None) -> None:
    if features.ndim != 3 or 0 in features.shape:
        raise ValueError(f"features has shape {tuple(features.shape)}; it must be (B, L, D), none of them 0")
    check_operand("features", features, "features", features, features.shape, FLOATS)
    if query.ndim != 3 or query.shape[1] == 0:
        raise ValueError(f"query has shape {tuple(query.shape)}; it must be (B, H, D), none of them 0")
    batch, _, dim = features.shape
    # Storage dtypes mix freely; float64 stays among itself.
    dtypes = (torch.float64,) if features.dtype == torch.float64 else FLOATS[:3]
    check_operand("query", query, "features", features, (batch, query.shape[1], dim), dtypes)
    if norm_weight is not None:
        check_operand("norm_weight", norm_weight, "features", features, (dim,), dtypes)


def _empty_saved(features: Tensor, query: Tensor) -> _Saved:
    """Pooled tokens (B, H, D), log-sum-exp (B, H), every token's scores and 1 / rms (B, H + 1, L)."""
    batch, tokens, _ = features.shape
    heads = query.shape[1]
    dtype = arithmetic_dtype(features)
    return (
        features.new_empty(query.shape, dtype=dtype),
        features.new_empty((batch, heads), dtype=dtype),
        features.new_empty((batch, heads + 1, tokens), dtype=dtype),
    )


def _forward(
    chosen: str,
    features: Tensor,
    query: Tensor,
    norm_weight: Tensor | None,
    eps: float,
    saved: _Saved | None,
) -> Tensor:
    out = torch.empty_like(query)
    kept = saved or (None, None, None)
    launch(chosen, "value_pool_forward", features, features, query, norm_weight, eps, out, *kept)
    return out


def _backward(
    chosen: str,
    grad: Tensor,
    features: Tensor,
    query: Tensor,
    norm_weight: Tensor | None,
    saved: _Saved,
    wanted: tuple[bool, bool, bool],
) -> _Grads:
    inputs = (features, query, norm_weight)
    grads = [
        torch.empty_like(tensor) if tensor is not None and is_wanted else None
        for tensor, is_wanted in zip(inputs, wanted, strict=True)
    ]
    launch(chosen, "value_pool_backward", features, *inputs, *saved, grad.contiguous(), *grads)
    return grads[0], grads[1], grads[2]


class _ValuePool(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, features: Tensor, query: Tensor, norm_weight: Tensor | None, eps: float, chosen: str
    ) -> Tensor:
        saved = _empty_saved(features, query)
        ctx.save_for_backward(features, query, norm_weight, *saved)
        ctx.chosen = chosen
        return _forward(chosen, features, query, norm_weight, eps, saved)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        features, query, norm_weight, *saved = ctx.saved_tensors
        grads = _backward(
            ctx.chosen, grad, features, query, norm_weight, tuple(saved), ctx.needs_input_grad[:3]
        )
        return (*grads, None, None)


@torch.library.custom_op("lacfast::value_pool", mutates_args=())
def _value_pool_op(
    features: Tensor, query: Tensor, norm_weight: Tensor | None, eps: float, trained: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    chosen = choose("value_pool_forward", features.device.type, features.dtype)
    saved = _empty_saved(features, query)
    out = _forward(chosen, features, query, norm_weight, eps, saved if trained else None)
    return out, *(saved if trained else _nothing(features))


@_value_pool_op.register_fake
def _(
    features: Tensor, query: Tensor, norm_weight: Tensor | None, eps: float, trained: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    saved = _empty_saved(features, query) if trained else _nothing(features)
    return torch.empty_like(query), *saved


@torch.library.custom_op("lacfast::value_pool_backward", mutates_args=())
def _value_pool_backward_op(
    grad: Tensor,
    features: Tensor,
    query: Tensor,
    norm_weight: Tensor | None,
    pooled: Tensor,
    log_sum_exp: Tensor,
    token_stats: Tensor,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    chosen = choose("value_pool_backward", features.device.type, features.dtype)
    flags = (wanted[0], wanted[1], wanted[2])
    saved = (pooled, log_sum_exp, token_stats)
    grads = _backward(chosen, grad, features, query, norm_weight, saved, flags)
    first, second, third = (
        absent if one is None else one for one, absent in zip(grads, _nothing(features), strict=True)
    )
    return first, second, third


@_value_pool_backward_op.register_fake
def _(
    grad: Tensor,
    features: Tensor,
    query: Tensor,
    norm_weight: Tensor | None,
    pooled: Tensor,
    log_sum_exp: Tensor,
    token_stats: Tensor,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    first, second, third = (
        torch.empty_like(tensor) if tensor is not None and is_wanted else absent
        for tensor, is_wanted, absent in zip(
            (features, query, norm_weight), wanted, _nothing(features), strict=True
        )
    )
    return first, second, third


def _nothing(like: Tensor) -> _Saved:
    # An operator cannot return None in a tensor's place.
    return like.new_empty(0), like.new_empty(0), like.new_empty(0)


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    features, query, norm_weight, _, _ = inputs
    ctx.save_for_backward(features, query, norm_weight, *output[1:])


def _op_backward(ctx: Any, grad: Tensor, *_: Tensor) -> Any:
    features, query, norm_weight, *saved = ctx.saved_tensors
    wanted = [*ctx.needs_input_grad[:2], norm_weight is not None and ctx.needs_input_grad[2]]
    grads = _value_pool_backward_op(grad, features, query, norm_weight, *saved, wanted)
    return *(one if is_wanted else None for one, is_wanted in zip(grads, wanted, strict=True)), None, None


_value_pool_op.register_autograd(_op_backward, setup_context=_setup_context)
