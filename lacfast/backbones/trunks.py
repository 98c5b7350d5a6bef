"""Critic trunks that all families share: the actor's taps, adapters or a copy of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from torch import Tensor, nn

from lacfast.backbones import lora as adapters
from lacfast.backbones.taps import Tap, record_taps
from lacfast.config import LoRAConfig
from lacfast.critic.trunk import Features, Trunk
from lacfast.records import Conditioning

Predict = Callable[[nn.Module, Tensor, Tensor, Conditioning], Tensor]


class SharedTrunk(Trunk):
    """The actor's own activations: no parameters, no forward; of trunk "joint" too."""

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


class OwnForwardTrunk(Trunk):
    """A trunk that reads the latents by a forward of its own and needs nothing of the actor's."""

    def record(self, model: nn.Module, *, detach: bool = True) -> AbstractContextManager[Features]:
        return record_taps(model, [], detach=detach)


class CopyTrunk(OwnForwardTrunk):
    """A full copy of the actor, initialised from it."""

    def __init__(self, model: nn.Module, shared: SharedTrunk, predict: Predict) -> None:
        super().__init__()
        self.model = adapters.merged_copy(model)
        self.shared = shared
        self.predict = predict
        self.tap_dims = shared.tap_dims

    def forward(
        self, features: Features, sample: Tensor, timestep: Tensor, conditioning: Conditioning
    ) -> list[Tensor]:
        with self.shared.record(self.model, detach=False) as own_features:
            self.predict(self.model, sample, timestep, conditioning)
        taps: list[Tensor] = self.shared(own_features, sample, timestep, conditioning)
        return taps


class LoRATrunk(OwnForwardTrunk):
    """The actor's base with the critic's own LoRA instead of the policy's."""

    def __init__(
        self,
        model: nn.Module,
        config: LoRAConfig,
        targets: tuple[str, ...],
        shared: SharedTrunk,
        predict: Predict,
    ) -> None:
        """`config` and `targets` as lora.add_adapter; the adapter's weights become the trunk's too."""
        super().__init__()
        self.adapter = adapters.own_name(model, adapters.CRITIC, self)
        self.weights = nn.ParameterList(adapters.add_adapter(model, self.adapter, config, targets))
        # In a tuple, so that the base is no part of the critic's own weights.
        self.base = (model,)
        modules: Iterable[Any] = model.modules()
        self.recomputing = tuple(module for module in modules if hasattr(module, "gradient_checkpointing"))
        self.shared = shared
        self.predict = predict
        self.tap_dims = shared.tap_dims

    def forward(
        self, features: Features, sample: Tensor, timestep: Tensor, conditioning: Conditioning
    ) -> list[Tensor]:
        (model,) = self.base
        with (
            adapters.activated(model, self.adapter),
            self._without_checkpointing(),
            self.shared.record(model, detach=False) as own_features,
        ):
            self.predict(model, sample, timestep, conditioning)
        taps: list[Tensor] = self.shared(own_features, sample, timestep, conditioning)
        return taps

    @contextmanager
    def _without_checkpointing(self) -> Iterator[None]:
        """Keep activations: a recomputation in the backward would run with the policy's adapter."""
        switched = [module for module in self.recomputing if module.gradient_checkpointing]
        try:
            for module in switched:
                module.gradient_checkpointing = False
            yield
        finally:
            for module in switched:
                module.gradient_checkpointing = True
