"""The policy with quantised weights, which samples rollouts; what is not quantised it shares with the policy.

It is a policy of its own, mu: the rollout keeps its outputs v_mu and the noise is a function of the key, so
the innovation form gives the exact ratio of every stochastic transition,

    log pi(x'|x) - log mu(x'|x) = mean( eps b dv / std - (b dv)^2 / (2 std^2) ),   dv = v_pi - v_mu

and PPO's ratio to the policy that acted (arXiv 1707.06347, section 3) needs no further correction. A weight
pi_old / mu times a ratio to pi_old (decoupled objective, arXiv 2110.00641) would centre the clip on pi_old,
at the price of one more forward of every trained pair: more than a cheaper rollout saves.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lacfast.runtime.graph import stored_as

Quantizer = Callable[[nn.Linear], None]
"""Replaces the frozen weight of a Linear by a quantised one."""

FP8_CAPABILITY = (8, 9)
"""First CUDA compute capability with float8 matrix products: Ada and Hopper."""
ALIGNMENT = 16
"""Both sizes of a float8 matrix must be multiples of it."""


def fp8(device: torch.device) -> Quantizer:
    """Weights and activations in float8 e4m3, one scale per row, products on the tensor cores.

    Raises:
        ValueError: without torchao, or on a device without float8 products.
    """
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    if capability is None or capability < FP8_CAPABILITY:
        raise ValueError(
            f"rollout_precision='fp8' needs float8 matrix products, of CUDA capability 8.9 on; {device} has "
            f"{capability or 'no CUDA'}; use 'fp8_weights', which saves memory only, or 'model'"
        )
    torchao = _torchao("fp8")
    return _torchao_quantizer(
        torchao, torchao.Float8DynamicActivationFloat8WeightConfig(granularity=torchao.PerRow())
    )


def fp8_weights(device: torch.device) -> Quantizer:
    """Weights in float8 e4m3, one scale per row, products in the model's dtype; on any device.

    Raises:
        ValueError: without torchao.
    """
    torchao = _torchao("fp8_weights")
    return _torchao_quantizer(torchao, torchao.Float8WeightOnlyConfig())


QUANTIZERS: dict[str, Callable[[torch.device], Quantizer]] = {"fp8": fp8, "fp8_weights": fp8_weights}
"""TrainConfig.rollout_precision -> how a layer is quantised on a device."""


def _torchao(precision: str) -> Any:
    try:
        from torchao import quantization
    except ImportError as error:
        raise ValueError(
            f"rollout_precision={precision!r} needs torchao: pip install 'lacfast[fp8]'; or use 'model'"
        ) from error
    return quantization


def _torchao_quantizer(torchao: Any, config: Any) -> Quantizer:
    def quantize(linear: nn.Linear) -> None:
        # torchao replaces what lies in the module that it is given.
        torchao.quantize_(nn.Sequential(linear), config)

    return quantize


@dataclass(frozen=True)
class QuantizedLinears:
    """The quantised layers of a copy beside those of the policy that they follow."""

    layers: list[tuple[nn.Linear, nn.Linear]]
    """(of the policy, of the copy)"""
    quantize: Quantizer
    dtype: torch.dtype
    """Dtype that the model runs in."""

    @torch.no_grad()
    def refresh(self) -> None:
        """Quantise the policy's weights of today, into the memory that captured graphs read."""
        for live, quantized in self.layers:
            _write(quantized.weight, self.quantized(live))

    @torch.no_grad()
    def quantized(self, live: nn.Linear) -> Tensor:
        with torch.device("meta"):
            staged = nn.Linear(live.in_features, live.out_features, bias=False)
        weight = live.weight.detach().to(self.dtype, copy=True)
        staged.weight = nn.Parameter(weight, requires_grad=False)
        self.quantize(staged)
        return staged.weight


def quantized_copy(
    model: nn.Module, class_names: tuple[str, ...], quantize: Quantizer, dtype: torch.dtype
) -> tuple[Any, QuantizedLinears]:
    """A copy of a model on the same weights but those of its blocks' Linear layers, which are quantised.

    Args:
        model: the policy's; a LoRA stays as it is, on a quantised base.
        class_names: of the blocks whose layers are quantised. Embeddings and the output keep their precision.
        quantize: one layer.
        dtype: that the model runs in.

    Raises:
        ValueError: when there is no layer to quantise.
    """
    shared = {id(tensor): tensor for tensors in (model.parameters(), model.buffers()) for tensor in tensors}
    copied = copy.deepcopy(model, shared)
    layers = dict(zip(_linears(model, class_names), _linears(copied, class_names), strict=True))
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no Linear layer in its blocks {class_names} whose sizes are "
            f"multiples of {ALIGNMENT}, so nothing can be quantised; use rollout_precision='model'"
        )
    linears = QuantizedLinears(list(layers.items()), quantize, dtype)
    for live, quantized in linears.layers:
        quantized.weight = nn.Parameter(linears.quantized(live), requires_grad=False)
    return copied, linears


def _linears(model: nn.Module, class_names: tuple[str, ...]) -> Iterator[nn.Linear]:
    """Linear layers in the order of the modules, each once, without the projections of adapters."""
    seen: set[nn.Module] = set()
    for block in model.modules():
        if type(block).__name__ not in class_names:
            continue
        for layer in block.modules():
            sizes = (layer.in_features, layer.out_features) if type(layer) is nn.Linear else (1,)
            if layer not in seen and all(size % ALIGNMENT == 0 for size in sizes):
                seen.add(layer)
                yield layer  # type: ignore[misc]


def _write(target: Tensor, source: Tensor) -> None:
    """Copy in place; of a tensor made of others, each of those."""
    for (_, mine), (_, new) in zip(stored_as("", target), stored_as("", source), strict=True):
        mine.copy_(new)
