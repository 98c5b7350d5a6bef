"""What the trainer asks of a backbone, a critic's trunk, a prompt encoder, an image codec and a reward."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
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


class Backbone(Protocol):
    """A diffusion model with its prompt encoder and image codec, implemented in lacfast.backbones."""

    model: nn.Module
    """What is trained, whole or by adapters in it."""
    dtype: torch.dtype
    """That the model runs in and takes its samples in."""
    latent_shape: tuple[int, ...]
    """(C, H, W), or (L, D) where the family packs its latents."""
    critic: Critic | None
    """Its value function; the trainer makes one, load_backbone loads one."""

    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """Conditioning (B, ...) of the prompts."""

    def encode_unconditional(self, count: int) -> Conditioning:
        """Conditioning (B, ...) of `count` samples without a prompt, for classifier-free guidance."""

    def predict(self, sample: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
        """Model output (B, ...) float32, or float64 where the noisy latents (B, ...) are, at timesteps (B,)
        float32."""

    def forward_signature(self) -> Hashable:
        """What decides the operations of `predict` besides tensors: dtype, adapters, attention. A captured
        graph has frozen it."""

    def decode(self, latents: Tensor) -> Tensor:
        """Images (B, 3, H, W) float in [0, 1] of clean latents."""

    def transition_table(self, config: SamplerConfig) -> TransitionTable:
        """The sampler that `config` describes, for this model's prediction type and scheduler."""

    def build_trunk(self, config: CriticConfig) -> Trunk:
        """A new trunk for a critic of this model."""

    def policy_parameters(self) -> list[nn.Parameter]:
        """What the policy's optimizer moves: all weights, or those of the policy's LoRA."""

    def policy_state(self) -> dict[str, Tensor]:
        """The live tensors that a checkpoint of the policy holds, by diffusers' names without adapters."""

    def frozen_reference(self) -> Backbone:
        """The policy of today for the KL: the same model without its LoRA, or else a frozen copy."""

    def enable_gradient_checkpointing(self) -> None:
        """Recompute the model's activations in the backward pass instead of keeping them."""

    def compile_blocks(self) -> None:
        """torch.compile the repeated blocks of model and critic, for sampling and training alike."""

    def quantized(self, precision: str) -> Backbone:
        """The same policy with quantised weights, for rollouts; see TrainConfig.rollout_precision."""

    def requantize(self) -> None:
        """Make a quantised policy follow the weights that it was made of; any other has nothing to do."""

    def save_pretrained(self, directory: Path) -> None:
        """Write what `load_backbone` and plain diffusers read."""

    def read_policy(self, directory: Path) -> dict[str, Tensor]:
        """The `policy_state` in a directory that `save_pretrained` wrote."""


class PromptEncoder(Protocol):
    """Text to embeddings."""

    def encode(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Token embeddings (B, L, D) and a pooled embedding (B, P); P = 0 where the family has none."""

    def encode_unconditional(self) -> tuple[Tensor, Tensor]:
        """The same, with B = 1, of what classifier-free guidance puts in a prompt's place."""

    def free(self) -> None:
        """Give back the memory of the weights; nothing is encoded afterwards."""


class LatentCodec(Protocol):
    """Latents to images."""

    def decode(self, latents: Tensor) -> Tensor:
        """Images (B, 3, H, W) float in [0, 1]."""
