"""Critic trunks that every family shares: the actor's own taps, and a full copy of the actor."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager

from torch import Tensor, nn

from lacfast.backbones.taps import Tap, record_taps
from lacfast.protocols import Features, Trunk
from lacfast.records import Conditioning

Predict = Callable[[nn.Module, Tensor, Tensor, Conditioning], Tensor]


class SharedTrunk(Trunk):
    """The actor's own activations: no parameters, no forward."""

    def __init__(self, taps: dict[str, tuple[Tap, int]]) -> None:
        """`taps`: feature name -> (tap that reads it as (B, L, D) tokens, D)."""
        super().__init__()
        self.names = list(taps)
        self.taps = [tap for tap, _ in taps.values()]
        self.tap_dims = tuple(dim for _, dim in taps.values())

    def record(self, model: nn.Module, *, detach: bool = True) -> AbstractContextManager[Features]:
        return record_taps(model, self.taps, detach=detach)

    def forward(
        self, features: Features, sample: Tensor, timestep: Tensor, conditioning: Conditioning
    ) -> list[Tensor]:
        return [features[name] for name in self.names]


class CopyTrunk(Trunk):
    """A full copy of the actor, initialised from it, that reads the latents itself."""

    def __init__(self, model: nn.Module, shared: SharedTrunk, predict: Predict) -> None:
        super().__init__()
        self.model = copy.deepcopy(model).requires_grad_(True)
        self.shared = shared
        self.predict = predict
        self.tap_dims = shared.tap_dims

    def record(self, model: nn.Module, *, detach: bool = True) -> AbstractContextManager[Features]:
        return record_taps(model, [], detach=detach)

    def forward(
        self, features: Features, sample: Tensor, timestep: Tensor, conditioning: Conditioning
    ) -> list[Tensor]:
        with self.shared.record(self.model, detach=False) as own_features:
            self.predict(self.model, sample, timestep, conditioning)
        taps: list[Tensor] = self.shared(own_features, sample, timestep, conditioning)
        return taps
