"""What all latent diffusion backbones share: prompt encoder, image codec, schedule, saving."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lacfast import schedule
from lacfast.backbones.trunks import CopyTrunk, SharedTrunk
from lacfast.config import CriticConfig, SamplerConfig
from lacfast.critic import Critic
from lacfast.protocols import LatentCodec, PromptEncoder, Trunk
from lacfast.records import Conditioning, TransitionTable


class LatentBackbone(ABC):
    """A diffusers model with its prompt encoder and latent codec.

    A family says how its model is called and cut.
    """

    def __init__(
        self,
        model: Any,
        prompt_encoder: PromptEncoder,
        codec: LatentCodec,
        *,
        latent_shape: tuple[int, ...],
        scheduler: Any = None,
    ) -> None:
        """
        Args:
            model: the family's diffusers model.
            prompt_encoder: text to embeddings; frozen.
            codec: latents to images; frozen.
            latent_shape: (C, H, W).
            scheduler: a diffusers scheduler that gives the noise levels. None: flow matching with
                SamplerConfig.shift.
        """
        self.model = model
        self.prompt_encoder = prompt_encoder
        self.codec = codec
        self.latent_shape = latent_shape
        self.scheduler = scheduler
        self.critic: Critic | None = None

    @property
    def device(self) -> torch.device:
        device: torch.device = next(self.model.parameters()).device
        return device

    @abstractmethod
    def conditioning(self, tokens: Tensor, pooled: Tensor) -> Conditioning:
        """The model's arguments for token embeddings (B, L, D) and a pooled embedding (B, P)."""

    @abstractmethod
    def predict_with(
        self, model: nn.Module, sample: Tensor, timestep: Tensor, conditioning: Conditioning
    ) -> Tensor:
        """Output (B, C, H, W) of `model`, this family's class."""

    @abstractmethod
    def shared_trunk(self) -> SharedTrunk:
        """Taps on the actor at several depths."""

    @abstractmethod
    def branch_trunk(self, num_blocks: int) -> Trunk:
        """Own copies of the last `num_blocks` blocks on the actor's lower features."""

    def predict(self, sample: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
        return self.predict_with(self.model, sample, timestep, conditioning)

    def build_trunk(self, config: CriticConfig) -> Trunk:
        if config.trunk == "shared":
            return self.shared_trunk()
        if config.trunk == "copy":
            return CopyTrunk(self.model, self.shared_trunk(), self.predict_with)
        if config.trunk == "branch":
            return self.branch_trunk(config.num_blocks)
        raise ValueError(
            f"critic trunk {config.trunk!r} has no value function to build; use 'branch', 'shared' or 'copy'"
        )

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """Conditioning (B, ...); every distinct prompt is encoded once."""
        distinct = list(dict.fromkeys(prompts))
        index = {prompt: row for row, prompt in enumerate(distinct)}
        rows = torch.tensor([index[prompt] for prompt in prompts], device=self.device)
        return self.conditioning(*self.prompt_encoder.encode(distinct)).to(self.device).select(rows)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        return self.codec.decode(latents)

    def transition_table(self, config: SamplerConfig) -> TransitionTable:
        window = None if config.kind == "ode" else config.stochastic_window
        if self.scheduler is not None:
            if config.shift != 1.0:
                raise ValueError(
                    f"shift={config.shift} would be ignored: {type(self.scheduler).__name__} sets the noise "
                    "levels; set the shift in its config"
                )
            return schedule.from_scheduler(
                self.scheduler, config.num_steps, config.kind, config.noise_level, window=window
            )
        sigmas = schedule.uniform_sigmas(config.num_steps, shift=config.shift)
        return schedule.flow_table(config.kind, sigmas, config.noise_level, window=window)

    def save_pretrained(self, directory: Path) -> None:
        """Write model/ in diffusers' own format, text/ and codec/."""
        self.model.save_pretrained(directory / "model")
        self.prompt_encoder.save_pretrained(directory / "text")
        self.codec.save_pretrained(directory / "codec")
