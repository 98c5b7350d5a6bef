"""diffusers pipelines as prompt encoder, image codec and scheduler: what surrounds a family's model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lacfast.backbones.fingerprint import encoder_identity
from lacfast.backbones.latent import LatentBackbone
from lacfast.backbones.scheduler_choice import flow_scheduler
from lacfast.config.checks import Config, Count, NonNegative
from lacfast.transfer import to_device


@dataclass(frozen=True, kw_only=True)
class PipelineSettings(Config):
    """How a pipeline is used; a saved directory keeps them."""

    resolution: tuple[Count, Count] | None = None
    """(height, width) in pixels. None: the pipeline's own."""
    negative_prompt: str | None = None
    """Text in the prompt's place for classifier-free guidance. None: what the pipeline does without one."""
    max_sequence_length: Count | None = None
    """Tokens of the T5 encoder of SD3 and FLUX. None: the pipeline's own, 256 and 512."""
    embedded_guidance: NonNegative = 3.5
    """Guidance that a distilled FLUX is told; not classifier-free guidance."""
    vae_dtype: str | None = None
    """torch's name of the dtype that the decoder runs in, "bfloat16". None: the decoder's own."""
    vae_slicing: bool = False
    """Decode one image at a time."""
    vae_tiling: bool = False
    """Decode an image in tiles."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.vae_dtype is not None and not isinstance(getattr(torch, self.vae_dtype, None), torch.dtype):
            raise ValueError(
                f"vae_dtype={self.vae_dtype!r} is no dtype of torch; use 'bfloat16' or 'float32'"
            )

    @property
    def negative_prompts(self) -> list[str] | None:
        """Negative prompts in the form that encode_prompt takes beside one prompt."""
        return None if self.negative_prompt is None else [self.negative_prompt]


Embeddings = tuple[Tensor, Tensor]
"""Tokens (B, L, D) and a pooled embedding (B, P); P = 0 where the family has none."""


class PipelineFamily(ABC):
    """How one class of pipelines is used; a family's file has one."""

    model_part: ClassVar[str]
    """Component that is trained: "unet" or "transformer"."""
    text_parts: ClassVar[tuple[str, ...]]
    """Components that only encode prompts."""

    @abstractmethod
    def encode(self, pipeline: Any, prompts: list[str], settings: PipelineSettings) -> Embeddings:
        """Through the pipeline's own encode_prompt."""

    @abstractmethod
    def encode_unconditional(self, pipeline: Any, settings: PipelineSettings) -> Embeddings:
        """B = 1, of the negative prompt."""

    @abstractmethod
    def latent_map(self, pipeline: Any, resolution: tuple[int, int]) -> tuple[int, ...]:
        """(C, H, W) of the latents of images of (height, width) pixels, before any packing."""

    @abstractmethod
    def backbone(
        self, pipeline: Any, settings: PipelineSettings, map_shape: tuple[int, ...], **shared: Any
    ) -> LatentBackbone:
        """The family's adapter; `shared` are LatentBackbone's arguments but for model and latent shape."""

    def scheduler(self, scheduler: Any) -> Any:
        """A scheduler of the same noise levels that a transition table can be made of."""
        return flow_scheduler(scheduler)

    def unpack(self, latents: Tensor, map_shape: tuple[int, ...]) -> Tensor:
        """Latents as the decoder takes them, (B, C, H, W)."""
        return latents


class PipelineEncoder:
    """A pipeline's text encoders as a PromptEncoder."""

    def __init__(self, pipeline: Any, family: PipelineFamily, settings: PipelineSettings) -> None:
        self.pipeline = pipeline
        self.family = family
        self.settings = settings
        self._places: dict[str, torch.device] = {}
        """Where the text encoders were before they were set aside."""

    def encode(self, prompts: Sequence[str]) -> Embeddings:
        return self.family.encode(self.pipeline, list(prompts), self.settings)

    def encode_unconditional(self) -> Embeddings:
        return self.family.encode_unconditional(self.pipeline, self.settings)

    def identity(self) -> str | None:
        """Digest of weights, tokenizers, settings, and what else may change a bit of the embeddings."""
        tokenizers = {
            name: part for name, part in self.pipeline.components.items() if name.startswith("tokenizer")
        }
        settings = (self.settings.max_sequence_length, self.settings.negative_prompt)
        return encoder_identity(self.pipeline, self._encoders(), tokenizers, settings)

    def set_aside(self) -> None:
        encoders = self._encoders()
        if not self._places:
            self._places = {name: encoder_device(encoder) for name, encoder in encoders.items()}
        for encoder in encoders.values():
            encoder.to("cpu")
        if any(place.type == "cuda" for place in self._places.values()):
            torch.cuda.empty_cache()

    def bring_back(self) -> None:
        for name, encoder in self._encoders().items():
            encoder.to(self._places[name])

    def _encoders(self) -> dict[str, Any]:
        """The text encoders that the pipeline has."""
        parts = {name: getattr(self.pipeline, name) for name in self.family.text_parts}
        return {name: encoder for name, encoder in parts.items() if encoder is not None}


class VAECodec:
    """A pipeline's VAE as a LatentCodec, in the VAE's own dtype."""

    def __init__(self, vae: Any, family: PipelineFamily, map_shape: tuple[int, ...]) -> None:
        self.vae = vae
        self.family = family
        self.map_shape = map_shape

    def decode(self, latents: Tensor) -> Tensor:
        """(decoder(latents / scaling + shift) / 2 + 1/2) clipped to [0, 1], float32."""
        config = self.vae.config
        scaled = self.family.unpack(latents, self.map_shape) / config.scaling_factor
        if getattr(config, "latents_mean", None) is not None:
            mean = to_device(torch.tensor(config.latents_mean), scaled.device).view(1, -1, 1, 1)
            std = to_device(torch.tensor(config.latents_std), scaled.device).view(1, -1, 1, 1)
            scaled = scaled * std + mean
        if getattr(config, "shift_factor", None) is not None:
            scaled = scaled + config.shift_factor
        images: Tensor = self.vae.decode(scaled.to(self.vae.dtype), return_dict=False)[0]
        return (images.float() / 2 + 0.5).clamp(0, 1)


def prepare_vae(vae: Any, settings: PipelineSettings) -> Any:
    """The VAE, frozen, in the dtype and with the memory savings that are asked for."""
    vae.eval().requires_grad_(False)
    if settings.vae_dtype is not None:
        vae.to(getattr(torch, settings.vae_dtype))
    elif vae.dtype == torch.float16 and getattr(vae.config, "force_upcast", False):
        # SDXL's decoder overflows in float16.
        vae.to(torch.float32)
    if settings.vae_slicing:
        vae.enable_slicing()
    if settings.vae_tiling:
        vae.enable_tiling()
    return vae


def encoder_device(encoder: Any) -> torch.device:
    """
    Raises:
        ValueError: when the pipeline came without this text encoder.
    """
    if encoder is None:
        raise ValueError("the pipeline has no text encoder to encode prompts with; load it with its encoders")
    device: torch.device = next(encoder.parameters()).device
    return device


def latent_map(
    pipeline: Any, channels: int, resolution: tuple[int, int], *, multiple: int = 1
) -> tuple[int, ...]:
    """(C, H, W) of the latents of images of `resolution`.

    Args:
        multiple: that latent height and width must be divisible by.

    Raises:
        ValueError: for a resolution that is no multiple of what the model needs.
    """
    factor = pipeline.vae_scale_factor
    if any(side % (factor * multiple) for side in resolution):
        step = factor * multiple
        near = tuple(max(round(side / step), 1) * step for side in resolution)
        raise ValueError(f"resolution={resolution} must be a multiple of {step} pixels; use {near}")
    return (channels, resolution[0] // factor, resolution[1] // factor)


def dynamic_shift(scheduler: Any, tokens: int, *, max_shift: float) -> dict[str, Any]:
    """The shift mu that a flow scheduler takes for this many image tokens; nothing when it is not dynamic.

    mu is linear in the tokens, from base_shift at base_image_seq_len to max_shift at max_image_seq_len.
    """
    if scheduler is None or not scheduler.config.get("use_dynamic_shifting", False):
        return {}
    config = scheduler.config
    low, high = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    base, top = config.get("base_shift", 0.5), config.get("max_shift", max_shift)
    return {"mu": base + (top - base) * (tokens - low) / (high - low)}
