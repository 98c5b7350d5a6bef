"""What a critic reads of the diffusion model: the part of it below the head, yours by `register_trunk`."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from lacfast.config import CriticConfig
from lacfast.config.critic import REGISTERED_TRUNKS, TRUNKS
from lacfast.records import Conditioning

Features = dict[str, Tensor]
"""Name -> (B, ...): tensors of the actor's forward that a trunk reads."""


class Trunk(nn.Module):
    """The part of a critic below its head; one subclass per backbone family and way of sharing."""

    tap_dims: tuple[int, ...]
    """D of each tap that `forward` returns."""
    compute_dtype: torch.dtype = torch.float32
    """The critic runs `forward` under autocast to this dtype; the trunk's own weights stay float32."""

    def record(self, model: nn.Module, *, detach: bool = True) -> AbstractContextManager[Features]:
        """Within the context, a forward of `model` fills the returned dict with this trunk's features."""
        raise TypeError(f"{type(self).__name__} does not define record")

    def forward(
        self, features: Features, sample: Tensor, timestep: Tensor, conditioning: Conditioning
    ) -> list[Tensor]:
        """Taps, each (B, L, D) tokens.

        Args:
            features: what `record` collected, (B, ...) each.
            sample: (B, ...) noisy latents.
            timestep: (B,) as the model takes it.
            conditioning: (B, ...)
        """
        raise TypeError(f"{type(self).__name__} does not define forward")


def register_trunk(name: str, build: Callable[[Any, CriticConfig], Trunk]) -> None:
    """Give a trunk of your own a name: from then on `CriticConfig(trunk=name)` is known, in files too.

    A process that loads a critic with this trunk must have registered it first.

    Args:
        name: what CriticConfig.trunk, recipes and saved critics call it.
        build: (lacfast.backbones.latent.LatentBackbone, settings of the critic) to a new trunk.

    Raises:
        ValueError: for a name that has a trunk already.
    """
    if name in TRUNKS or name in REGISTERED_TRUNKS:
        raise ValueError(f"critic trunk {name!r} is taken; register yours under another name")
    REGISTERED_TRUNKS[name] = build


def registered_trunk(backbone: Any, config: CriticConfig) -> Trunk:
    """A new trunk of the builder that was registered for `config.trunk`.

    Raises:
        ValueError: for a trunk without one, which "none" is.
    """
    if config.trunk not in REGISTERED_TRUNKS:
        known = (*(trunk for trunk in TRUNKS if trunk != "none"), *REGISTERED_TRUNKS)
        raise ValueError(
            f"critic trunk {config.trunk!r} has no value function to build; use one of {', '.join(known)}"
        )
    trunk: Trunk = REGISTERED_TRUNKS[config.trunk](backbone, config)
    return trunk
