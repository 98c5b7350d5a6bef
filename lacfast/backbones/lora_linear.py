"""peft's LoRA of a Linear layer in fewer operations: the adapter is added inside a matrix product.

    y = x W^T + b + s (x A^T) B^T          (LoRA, arXiv 2106.09685, equation 3)

In float32 and float64 it is computed as x (W + s B A)^T + b: one product of activation size instead of
three, no pass to scale and none to add. In 16 bits that sum would round a small adapter away, so the low-rank
product is accumulated into the output. Which form runs depends on dtype and layer alone, never on the batch:
rollout and update round alike.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora import Linear as PeftLinear
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn.functional import linear

from lacfast.backbones.int8 import Int8Linear, dequantized, running_dtype

MERGED_DTYPES = (torch.float32, torch.float64)
"""Dtypes of the layers whose adapter is added to the weight."""
DENSE_GRADIENT_SIZE = 192 * 192
"""Elements of a weight up to which its whole gradient takes less time than four products of rank r."""


class LoRALinear(PeftLinear):
    """peft's layer with a faster forward; whatever that does not cover is left to peft's own."""

    @staticmethod
    def install(layer: Any) -> None:
        """Give a layer this class, in place; other kinds of layers keep theirs: convolutions, quantised."""
        if type(layer) is PeftLinear:
            # The same attributes: names, state and what peft and diffusers ask of the layer stay.
            layer.__class__ = LoRALinear

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        adapter = None if args or kwargs else self._covered(x)
        if adapter is None:
            output: Tensor = super().forward(x, *args, **kwargs)
            return output
        base: Any = self.base_layer
        projections: Any = self.lora_A[adapter], self.lora_B[adapter]
        down, up = (projection.weight for projection in projections)
        down_cast, up_cast = (getattr(projection, "cast", None) for projection in projections)
        scale = base.weight_scale if isinstance(base, Int8Linear) else None
        return lora_linear(
            *(x, base.weight, base.bias, down, up),
            scaling=self.scaling[adapter],
            down_cast=down_cast,
            up_cast=up_cast,
            scale=scale,
        )

    def _covered(self, x: Tensor) -> str | None:
        """The adapter that alone is active on a plain layer, if this forward computes what peft's would."""
        if self.disable_adapters or self.merged or len(self.active_adapters) != 1:
            return None
        (adapter,) = self.active_adapters
        is_plain = (
            adapter in self.lora_A
            and adapter not in self.lora_variant
            and not self.lora_bias[adapter]
            and not self.fan_in_fan_out
            and isinstance(self.lora_dropout[adapter], nn.Identity)
        )
        return adapter if is_plain and self._base_is_plain(x) and self._casts_to(adapter, x.dtype) else None

    def _base_is_plain(self, x: Tensor) -> bool:
        """A frozen layer that nobody looks into, in the input's dtype: nn.Linear, or ours in int8."""
        base: Any = self.base_layer
        return (
            type(base) in (nn.Linear, Int8Linear)
            and type(base.weight) is nn.Parameter
            and running_dtype(base) == x.dtype
            and not base.weight.requires_grad
            and (base.bias is None or not base.bias.requires_grad)
            and not base._forward_hooks
            and not base._forward_pre_hooks
            # The meta device has no autocast, and torch raises when asked for it.
            and (x.is_meta or not torch.is_autocast_enabled(x.device.type))
        )

    def _casts_to(self, adapter: str, dtype: torch.dtype) -> bool:
        """Whether peft, too, would run the adapter in the input's dtype."""
        return (
            not getattr(self, "cast_input_dtype_enabled", True) or self.lora_A[adapter].weight.dtype == dtype
        )


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    down: Tensor,
    up: Tensor,
    *,
    scaling: float,
    down_cast: Tensor | None = None,
    up_cast: Tensor | None = None,
    scale: Tensor | None = None,
) -> Tensor:
    """Output (..., out) of a frozen Linear layer with a LoRA; equation at the head of the file.

    Gradients flow to x, down and up.

    Args:
        x: (..., in).
        weight: (out, in), W; with `scale` its levels in int8, and W is what lacfast.backbones.int8 makes of
            them in x's dtype.
        bias: (out,) or None, b.
        down: (r, in), A, of any dtype.
        up: (out, r), B, of any dtype.
        scaling: s = alpha / r.
        down_cast: `down` in the weight's dtype, where that was made before; another dtype's is not taken.
        up_cast: `up`, likewise.
        scale: (out, 1) of a weight in int8. None: it is none.
    """
    if x.dtype in MERGED_DTYPES and weight.numel() <= DENSE_GRADIENT_SIZE:
        weight = dequantized(weight, scale, x.dtype)
        added = torch.addmm(weight, up.to(weight.dtype), down.to(weight.dtype), alpha=scaling)
        return linear(x, added, bias)
    rows = x.reshape(-1, x.shape[-1])
    settings = scaling, down_cast, up_cast, scale
    output: Tensor = _LowRankGradients.apply(rows, weight, bias, down, up, settings)  # type: ignore[no-untyped-call]
    return output.view(*x.shape[:-1], output.shape[-1])


class _LowRankGradients(Function):
    """`lora_linear` on rows (N, in). Its backward never forms the gradient of the weight:

    v = dy B,   dx = dy (W + s B A) = dy W + s v A,   dB = s dy^T (x A^T),   dA = s v^T x
    """

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        master_down: Tensor,
        master_up: Tensor,
        settings: tuple[float, Tensor | None, Tensor | None, Tensor | None],
    ) -> Tensor:
        """`settings` are the last four arguments of `lora_linear`, of which none has a gradient."""
        scaling, down_cast, up_cast, scale = settings
        stored, weight = weight, dequantized(weight, scale, rows.dtype)
        down, up = _as(weight.dtype, master_down, down_cast), _as(weight.dtype, master_up, up_cast)
        reduced = None
        if weight.dtype in MERGED_DTYPES:
            output = linear(rows, torch.addmm(weight, up, down, alpha=scaling), bias)
        else:
            reduced = rows.mm(down.t())
            output = linear(rows, weight, bias)
            # In place, by the operator whose FLOPs torch counts.
            torch.addmm(output, reduced, up.t(), alpha=scaling, out=output)
        ctx.save_for_backward(rows, stored, scale, down, up, reduced)
        ctx.scaling = scaling
        ctx.dtypes = master_down.dtype, master_up.dtype
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (d_output,) = gradients
        rows, stored, scale, down, up, reduced = ctx.saved_tensors
        needs_rows, _, _, needs_down, needs_up, *_ = ctx.needs_input_grad
        d_rows = d_down = d_up = None
        d_reduced = d_output.mm(up)
        weight = dequantized(stored, scale, rows.dtype) if needs_rows else stored
        if needs_rows and reduced is None:
            # Cheaper to add again than to keep for every layer.
            d_rows = d_output.mm(torch.addmm(weight, up, down, alpha=ctx.scaling))
        elif needs_rows:
            d_rows = d_output.mm(weight)
            torch.addmm(d_rows, d_reduced, down, alpha=ctx.scaling, out=d_rows)
        if needs_down:
            d_down = d_reduced.t().mm(rows).mul_(ctx.scaling).to(ctx.dtypes[0])
        if needs_up:
            reduced = rows.mm(down.t()) if reduced is None else reduced
            d_up = d_output.t().mm(reduced).mul_(ctx.scaling).to(ctx.dtypes[1])
        return d_rows, None, None, d_down, d_up, None


def _as(dtype: torch.dtype, master: Tensor, cast: Tensor | None) -> Tensor:
    return cast if cast is not None and cast.dtype == dtype else master.to(dtype)
