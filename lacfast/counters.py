"""Counts of what torch dispatches while a function runs: operations, kernels, host syncs, FLOPs, saved bytes.

They depend on shapes only, so they run on the meta device, where a model has no memory and no speed.
Attention is counted as one operation and without its (L, L) weights, as every fused kernel has it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

# Registers the operators that are counted.
import lacfast.ops  # noqa: F401

_ATEN = torch.ops.aten
_UNCOUNTED = {
    # Asked by wrappers of tensors; it reads an attribute.
    torch.ops.prim.device.default,
    _ATEN.empty.memory_format,
    _ATEN.empty_like.default,
    _ATEN.empty_strided.default,
    _ATEN.new_empty.default,
    _ATEN.new_empty_strided.default,
}
"""Allocations, which a static buffer or the caching allocator answers."""


class OperationCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts what is dispatched, and the host's waits for a value of a device that is not the CPU.

    On the meta device a wait has no value to return: it gets 1 (a number) or zeros (a copy).
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations = 0
        """All that is dispatched but allocations; views too, since the host pays for them."""
        self.kernels = 0
        """Those among them that are no views."""
        self.syncs = 0
        self.flops = 0
        """A multiply-add counts as two, element-wise work not at all."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        named = kwargs or {}
        if func in _UNCOUNTED:
            return func(*args, **named)
        self.operations += 1
        self.kernels += not (func.is_view or func is _ATEN._unsafe_view.default)
        if _is_awaited(func, args, named):
            self.syncs += 1
            if args[0].is_meta:
                return _stand_in(func, args[0], named)
        output = func(*args, **named)
        packet = func._overloadpacket
        if packet in _LACFAST_FLOPS:
            self.flops += _LACFAST_FLOPS[packet](*args)
        elif packet in flop_registry:
            self.flops += int(flop_registry[packet](*args, **named, out_val=output))
        return output


def _is_awaited(func: Any, args: tuple[Any, ...], named: dict[str, Any]) -> bool:
    """Whether the host waits here for the device."""
    if func is _ATEN._local_scalar_dense.default:
        return bool(args[0].device.type != "cpu")
    is_copy = func is _ATEN._to_copy.default and named.get("device") == torch.device("cpu")
    return is_copy and bool(args[0].device.type != "cpu")


def _stand_in(func: Any, tensor: Tensor, named: dict[str, Any]) -> Any:
    """What the host gets in place of a value that does not exist."""
    if func is _ATEN._to_copy.default:
        return torch.zeros(tensor.shape, dtype=named.get("dtype") or tensor.dtype)
    return 1.0 if tensor.is_floating_point() else 1


@contextmanager
def fused_attention() -> Iterator[None]:
    """Fused attention on the meta device, where torch would write it out.

    A mode of torch would not see a checkpointed forward when the backward pass runs it again.
    """
    original = nn.functional.scaled_dot_product_attention

    def attention(
        query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *args: Any, **named: Any
    ) -> Tensor:
        if not query.is_meta or attn_mask is not None:
            return original(query, key, value, attn_mask, *args, **named)
        # Dropout and a causal mask change no shape.
        output: Tensor = _ATEN._scaled_dot_product_flash_attention(query, key, value)[0]
        return output

    nn.functional.scaled_dot_product_attention = attention
    try:
        yield
    finally:
        nn.functional.scaled_dot_product_attention = original


def counted(body: Callable[[], Any]) -> OperationCounter:
    """What `body` dispatches."""
    counter = OperationCounter()
    with fused_attention(), counter:
        body()
    return counter


def saved_bytes(body: Callable[[], Any], model: nn.Module) -> int:
    """Bytes that autograd keeps for the backward pass, each tensor once, the weights not counted."""
    seen: dict[int, Tensor] = {id(parameter): parameter for parameter in model.parameters()}
    total = 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal total
        base = tensor._base if tensor._base is not None else tensor
        if id(base) not in seen:
            seen[id(base)] = base
            total += base.numel() * base.element_size()
        return tensor

    with fused_attention(), saved_tensors_hooks(pack, lambda tensor: tensor):
        body()
    return total


def _value_pool(features: Tensor, query: Tensor, *_: Any) -> int:
    """Scores and the weighted sum."""
    batch, tokens, dim = features.shape
    return 4 * batch * query.shape[1] * tokens * dim


def _value_pool_backward(grad: Tensor, features: Tensor, *rest: Any) -> int:
    """Gradients of weights and query; where features need one, of both of their uses."""
    wanted = rest[-1]
    return _value_pool(features, grad) * (2 if wanted[0] else 1)


def _cpu_attention(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> int:
    shapes = (query.shape, key.shape, value.shape)
    return int(sdpa_flop_count(*shapes))  # type: ignore[no-untyped-call]


def _cpu_attention_backward(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any) -> int:
    shapes = (grad.shape, query.shape, key.shape, value.shape)
    return int(sdpa_backward_flop_count(*shapes))  # type: ignore[no-untyped-call]


_LACFAST_FLOPS: dict[Any, Callable[..., int]] = {
    torch.ops.lacfast.value_pool: _value_pool,
    torch.ops.lacfast.value_pool_backward: _value_pool_backward,
    _ATEN._scaled_dot_product_flash_attention_for_cpu: _cpu_attention,
    _ATEN._scaled_dot_product_flash_attention_for_cpu_backward: _cpu_attention_backward,
}
"""FLOPs of what torch's own table lacks."""
