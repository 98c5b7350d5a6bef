"""Float32 weights in a model of 16 bits: adapters', cast together when a forward begins, and norms'.

Masters change in many ways: by an optimizer's step, eager or in a graph, a checkpoint, an average, by hand. A
cast that outlived one of them would be wrong without a sign, so none outlives the forward that it was made
for, and a graph of a forward holds the cast too.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from lacfast.backbones.int8 import running_dtype


class MasterLinear(nn.Linear):
    """A float32 projection that computes in its input's dtype."""

    cast: Tensor | None = None
    """The weight in the adapted layer's dtype, without a gradient, while the model runs forward."""

    @staticmethod
    def wrap(linear: nn.Linear) -> MasterLinear:
        """The same weight in float32, as another module."""
        with torch.device("meta"):
            master = MasterLinear(linear.in_features, linear.out_features, bias=False)
        master.weight = nn.Parameter(linear.weight.detach().float())
        return master

    def forward(self, hidden_states: Tensor) -> Tensor:
        weight, dtype = self.weight, hidden_states.dtype
        is_constant = not (torch.is_grad_enabled() and weight.requires_grad)
        if is_constant and self.cast is not None and self.cast.dtype == dtype:
            return nn.functional.linear(hidden_states, self.cast)
        return nn.functional.linear(hidden_states, weight.to(dtype))


class MasterRMSNorm(nn.RMSNorm):
    """A norm with a float32 weight that is given 16 bits: in float32 and back.

    torch computes it so too, but of two dtypes only in many kernels, for which it warns.
    """

    @staticmethod
    def install(module: nn.Module) -> None:
        """Give all norms in a module this class, in place: the same attributes."""
        for part in module.modules():
            if type(part) is nn.RMSNorm:
                part.__class__ = MasterRMSNorm

    def forward(self, hidden_states: Tensor) -> Tensor:
        dtype = hidden_states.dtype if self.weight is None else self.weight.dtype
        return super().forward(hidden_states.to(dtype)).to(hidden_states.dtype)


class Casts:
    """The masters of one adapter, and their casts as long as a forward needs them."""

    def __init__(self, projections: Iterable[tuple[MasterLinear, Any]]) -> None:
        """`projections`: masters, each with the layer that it adapts."""
        self._groups: dict[torch.dtype, dict[torch.Size, list[MasterLinear]]] = {}
        for master, base in projections:
            dtype = running_dtype(base)
            if dtype in (torch.bfloat16, torch.float16):
                of_shape = self._groups.setdefault(dtype, {})
                of_shape.setdefault(master.weight.shape, []).append(master)
        self.made: list[Tensor] = []
        """Casts of the forward that runs."""

    @torch.no_grad()
    def make(self) -> None:
        """Cast all masters as they are now."""
        casts: list[Tensor] = []
        for dtype, of_shape in self._groups.items():
            sources: list[Tensor] = []
            made: list[Tensor] = []
            for masters in of_shape.values():
                weights = [vars(master)["_parameters"]["weight"] for master in masters]
                # New memory for every forward: the backward pass of the one before may still need its own.
                made += weights[0].new_empty((len(weights), *weights[0].shape), dtype=dtype).unbind()
                sources += weights
            # One dtype at a time: only lists of one have a fused kernel.
            torch._foreach_copy_(made, sources)
            casts += made
        self.hand_out(casts)

    def kept(self) -> AbstractContextManager[None]:
        """A context in which parts of the forward that runs now can run again later, with its casts."""
        return _Again(self, self.made)

    def hand_out(self, casts: list[Tensor]) -> None:
        """Give every master its cast, or none."""
        self.made, given = casts, iter(casts)
        for of_shape in self._groups.values():
            for master in chain.from_iterable(of_shape.values()):
                # Past torch's own assignment, which looks for parameters first.
                vars(master)["cast"] = next(given, None)


class _Again(AbstractContextManager[None]):
    """May be entered more than once, as a graph that is retained is recomputed more than once."""

    def __init__(self, owner: Casts, casts: list[Tensor]) -> None:
        self.owner = owner
        self.casts = casts

    def __enter__(self) -> None:
        self.owner.hand_out(self.casts)

    def __exit__(self, *exception: object) -> None:
        self.owner.hand_out([])
