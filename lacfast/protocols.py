"""What the trainer asks of a backbone, a critic's trunk, a prompt encoder, an image codec and a reward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor, nn

from lacfast.config import CriticConfig, SamplerConfig
from lacfast.records import Conditioning, TransitionTable

if TYPE_CHECKING:
    from lacfast.critic import Critic

Reward = Callable[[Tensor, list[str], list[dict[str, Any]]], Any]
"""(images (B, 3, H, W) float in [0, 1], prompts, metadata) -> (B,) tensor or array."""

Features = dict[str, Tensor]
"""name -> (B, ...): what a trunk needs of the actor's forward."""


class Trunk(nn.Module):
    """The part of a critic below its head; one subclass per backbone family and way of sharing."""

    tap_dims: tuple[int, ...]
    """D of each tap that `forward` returns."""

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


class Backbone(Protocol):
    """A diffusion model with its prompt encoder and image codec, implemented in lacfast.backbones."""

    model: nn.Module
    """What is trained."""
    latent_shape: tuple[int, ...]
    """(C, H, W)"""
    critic: Critic | None
    """Its value function; the trainer makes one, load_backbone loads one."""

    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """Conditioning (B, ...) of the prompts."""

    def predict(self, sample: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
        """Model output (B, ...) of noisy latents (B, ...) at timesteps (B,) float32."""

    def decode(self, latents: Tensor) -> Tensor:
        """Images (B, 3, H, W) float in [0, 1] of clean latents."""

    def transition_table(self, config: SamplerConfig) -> TransitionTable:
        """The sampler that `config` describes, for this model's prediction type and scheduler."""

    def build_trunk(self, config: CriticConfig) -> Trunk:
        """A new trunk for a critic of this model."""

    def save_pretrained(self, directory: Path) -> None:
        """Write what `load_backbone` reads."""


class PromptEncoder(Protocol):
    """Text to embeddings."""

    def encode(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Token embeddings (B, L, D) and a pooled embedding (B, P)."""

    def save_pretrained(self, directory: Path) -> None:
        """Write what the class's `from_pretrained` reads."""


class LatentCodec(Protocol):
    """Latents to images."""

    def decode(self, latents: Tensor) -> Tensor:
        """Images (B, 3, H, W) float in [0, 1]."""

    def save_pretrained(self, directory: Path) -> None:
        """Write what the class's `from_pretrained` reads."""
