"""What a critic reads of the diffusion model: the part of it below the head."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lacfast.records import Conditioning

if TYPE_CHECKING:
    pass


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
