"""The frozen base of a LoRA in int8: a byte per weight and a scale per row, products in the model's dtype.

    y = x W'^T + b,   W' = s Q in the model's dtype,   Q = round(W / s),   s = max |row| / 127

It is the model with the weights W', bit for bit, and whoever acts and whoever learns run it. No W' outlives
the product that it is for: the backward pass makes it again. All is made of torch's own operations, so that
every device runs them, a graph holds them, and a dry run on the meta device follows their bytes, where a
tensor of torchao's says that it has those of the model's dtype.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn.functional import linear

from lacfast.backbones.casting import cast_weights

LEVELS = 127
"""Q lies in [-127, 127]."""


class Int8Linear(nn.Linear):
    """A frozen Linear layer whose weight is Q."""

    scale_bits: nn.Parameter
    """(out, 1) int32, the bits of s in float32: what casts a model to 16 bits leaves them alone."""
    dtype: torch.dtype
    """Dtype of W', and of what the layer is given."""

    @staticmethod
    @torch.no_grad()
    def install(layer: Any) -> None:
        """Make a plain layer one of these, in place, with the dtype that its weight had."""
        weight = layer.weight
        largest = weight.float().abs().amax(dim=1, keepdim=True)
        # A row of zeros has some scale too.
        scale = torch.where(largest > 0, largest / LEVELS, 1.0)
        levels = (weight.float() / scale).round().to(torch.int8)
        layer.__class__ = Int8Linear
        layer.dtype = weight.dtype
        layer.weight = nn.Parameter(levels, requires_grad=False)
        layer.scale_bits = nn.Parameter(scale.view(torch.int32), requires_grad=False)

    @property
    def weight_scale(self) -> Tensor:
        """(out, 1) float32, s."""
        return self.scale_bits.view(torch.float32)

    @torch.no_grad()
    def make_plain(self) -> None:
        """Make it a plain layer on W', in place."""
        weight = self.dequantized()
        del self.scale_bits
        self.__class__ = nn.Linear  # type: ignore[assignment]
        self.weight = nn.Parameter(weight, requires_grad=False)

    def dequantized(self) -> Tensor:
        """W' (out, in)."""
        return dequantized(self.weight, self.weight_scale, self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = _Product.apply(x, self.weight, self.weight_scale, self.bias, self.dtype)  # type: ignore[no-untyped-call]
        return output


def dequantized(levels: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """W' of Q (out, in) and s (out, 1), without a gradient; without s the levels are the weight."""
    return levels if scale is None else (levels * scale).to(dtype)


def quantize_base(model: Any, class_names: tuple[str, ...], dtype: torch.dtype) -> None:
    """Quantise the Linear layers of a model's blocks, in place.

    Args:
        model: frozen, without adapters; it gets the dtype.
        class_names: of the blocks. Embeddings and the output keep their precision.
        dtype: that the model runs in.

    Raises:
        ValueError: when no block has a Linear layer.
    """
    cast_weights(model, dtype)
    blocks = [block for block in model.modules() if type(block).__name__ in class_names]
    layers = {part for block in blocks for part in block.modules() if type(part) is nn.Linear}
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no Linear layer in its blocks {class_names}, so nothing can be "
            "quantised; use base_precision='model'"
        )
    for layer in layers:
        Int8Linear.install(layer)


def is_quantized(model: nn.Module) -> bool:
    """Whether the model's base is in int8."""
    return any(isinstance(part, Int8Linear) for part in model.modules())


def running_dtype(layer: Any) -> torch.dtype:
    """What a Linear layer, quantised or not, computes in."""
    dtype: torch.dtype = layer.dtype if isinstance(layer, Int8Linear) else layer.weight.dtype
    return dtype


class _Product(Function):
    """x W'^T + b for x (..., in), which keeps Q alone for dx = dy W'."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, levels: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        ctx.save_for_backward(levels, scale)
        ctx.dtype = dtype
        return linear(x, dequantized(levels, scale, dtype), bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (d_output,) = gradients
        levels, scale = ctx.saved_tensors
        rows = d_output.reshape(-1, d_output.shape[-1])
        d_rows = rows.mm(dequantized(levels, scale, ctx.dtype))
        return d_rows.view(*d_output.shape[:-1], -1), None, None, None, None
