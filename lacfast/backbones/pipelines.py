"""diffusers pipelines as prompt encoder, image codec and scheduler: what surrounds a family's model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lacfast.backbones.casting import cast_weights
from lacfast.backbones.fingerprint import encoder_identity
from lacfast.backbones.latent import LatentBackbone
from lacfast.backbones.parts import Embeddings
from lacfast.backbones.scheduler_choice import flow_scheduler
from lacfast.backbones.transformer import unpacked
from lacfast.config import PipelineSettings
from lacfast.transfer import to_device

TOKENS = "encoder_hidden_states"
"""Name of a prompt's tokens in every family."""

UNDER_MASK: Mapping[str, Any] = {
    "prompt_outputs": {TOKENS: 0, "encoder_attention_mask": 1},
    "negative_outputs": {TOKENS: 2, "encoder_attention_mask": 3},
    "sequence_length": 300,
    "token_width": "caption_channels",
}
"""Prompts as PixArt's pipelines give them, and SANA's after them: 300 tokens under a mask."""


@dataclass(frozen=True, kw_only=True)
class PipelineFamily:
    """How one class of pipelines is used; a family's file has one."""

    backbone_class: type[LatentBackbone]
    """The family's adapter."""
    model_part: str = "transformer"
    """Component that is trained."""
    text_parts: tuple[str, ...] = ("text_encoder",)
    """Components that only encode prompts."""
    prompt_outputs: Mapping[str, int]
    """What the backbone reads of a prompt -> its place in what encode_prompt returns."""
    negative_outputs: Mapping[str, int] | None = None
    """Places of the negative prompt that guidance gets beside one. None: it is encoded as a prompt."""
    prompt_options: Mapping[str, Any] = field(default_factory=dict)
    """Further arguments of encode_prompt."""
    empty_prompt: str | None = ""
    """What stands for no negative prompt. None: the pipeline's own way without one."""
    sequence_length: int | None = None
    """encode_prompt's max_sequence_length in the pipeline's own call; None: it takes none."""
    longest_prompt: int | None = None
    """The largest that the pipeline's own call takes. None: it looks at none."""
    mask: str | None = None
    """The backbone's mask of the tokens (B, L), where encode_prompt pads to the longest prompt: each is then
    encoded alone and padded to `sequence_length`, so that its bits depend on no other."""
    scheduler: Callable[[Any], Any] = flow_scheduler
    """Makes, of the pipeline's scheduler, one of its noise levels that a transition table can be made of."""
    token_width: str | None = None
    """Entry of the model's config with the width of a prompt's tokens, where a blueprint cannot run the
    encoder because it looks at values. None: it can."""
    pads_to: int = 1
    """A masked prompt's length is rounded up to a multiple of it."""
    multiple: int | None = None
    """What sides of the latents must be divisible by. None: the model's patch size."""
    resolution: tuple[int, int] | None = None
    """(height, width) in pixels of the pipeline's own call, where no config tells it."""
    scale_factor: str = "vae_scale_factor"
    """Attribute of the pipeline with the pixels that a side of the latents stands for."""
    has_frames: bool = False
    """Whether the decoder takes and gives a video (B, C, F, H, W); a picture is one of a single frame."""
    num_frames: int | None = None
    """Frames of the pipeline's own call; None: it makes pictures."""

    def require_read(self, settings: PipelineSettings, pipeline: Any) -> None:
        """
        Raises:
            ValueError: for frames of a picture, a guidance or a length of prompts that this pipeline does not
                know, and for a length beyond those that its own call takes.
        """
        kind, length = type(pipeline).__name__, settings.max_sequence_length
        for name in ("num_frames", "judged_frames") if self.num_frames is None else ():
            if getattr(settings, name) is not None:
                raise ValueError(
                    f"{name}={getattr(settings, name)} would be ignored: a {kind} makes pictures and no "
                    "videos; leave it out"
                )
        if length is not None and self.sequence_length is None:
            raise ValueError(
                f"max_sequence_length={length} would be ignored: a {kind} has the length of its CLIP "
                "encoders; leave it out"
            )
        if length is not None and self.longest_prompt is not None and length > self.longest_prompt:
            raise ValueError(
                f"max_sequence_length={length} is more than a {kind} takes; use at most {self.longest_prompt}"
            )
        guidance, model = settings.embedded_guidance, getattr(pipeline, self.model_part)
        if guidance is not None and not model.config.get("guidance_embeds", False):
            raise ValueError(
                f"embedded_guidance={guidance} would be ignored: the {type(model).__name__} is told no "
                f"guidance; leave it out, or use SamplerConfig(guidance_scale={guidance})"
            )

    def encode(self, pipeline: Any, prompts: list[str], settings: PipelineSettings) -> Embeddings:
        """(B, ...) of the prompts, through the pipeline's own encode_prompt."""
        if self.mask is None:
            return self._encoded(pipeline, prompts, settings, self.prompt_outputs)
        padded, length = {}, self._length(settings)
        for prompt in dict.fromkeys(prompts):
            tokens = self._encoded(pipeline, [prompt], settings, self.prompt_outputs)[TOKENS]
            padded[prompt] = _padded(tokens, self.mask, length)
        return {name: torch.cat([padded[prompt][name] for prompt in prompts]) for name in (TOKENS, self.mask)}

    def _length(self, settings: PipelineSettings) -> int:
        """Tokens of every prompt, where the pipeline lets choose."""
        length = settings.max_sequence_length or self.sequence_length
        assert length is not None
        return -(-length // self.pads_to) * self.pads_to

    def prompt_shapes(
        self, pipeline: Any, settings: PipelineSettings
    ) -> Mapping[str, tuple[int, ...]] | None:
        """Shapes of what `encode` gives of a prompt; None where its encoders run on any device."""
        if self.token_width is None:
            return None
        length = self._length(settings)
        width = getattr(pipeline, self.model_part).config[self.token_width]
        masks = (
            [self.mask] if self.mask is not None else [name for name in self.prompt_outputs if name != TOKENS]
        )
        return {TOKENS: (length, width)} | dict.fromkeys(masks, (length,))

    def encode_unconditional(self, pipeline: Any, settings: PipelineSettings) -> Embeddings:
        """B = 1, of the negative prompt."""
        negative = self.empty_prompt if settings.negative_prompt is None else settings.negative_prompt
        if self.negative_outputs is None:
            return self.encode(pipeline, [negative or ""], settings)
        given = None if negative is None else [negative]
        guided = {"do_classifier_free_guidance": True, "negative_prompt": given}
        return self._encoded(pipeline, [""], settings, self.negative_outputs, **guided)

    def _encoded(
        self,
        pipeline: Any,
        prompts: list[str],
        settings: PipelineSettings,
        outputs: Mapping[str, int],
        **guided: Any,
    ) -> Embeddings:
        options = {**self.prompt_options}
        if self.sequence_length is not None:
            options["max_sequence_length"] = settings.max_sequence_length or self.sequence_length
        if self.negative_outputs is not None:
            options |= guided or {"do_classifier_free_guidance": False}
        encoders = [getattr(pipeline, name) for name in self.text_parts]
        device = encoder_device(next((encoder for encoder in encoders if encoder is not None), None))
        made = pipeline.encode_prompt(prompt=prompts, device=device, **options)
        # Some give a list of prompts.
        return {
            name: made[place] if isinstance(made[place], Tensor) else torch.stack(list(made[place]))
            for name, place in outputs.items()
        }

    def latent_map(self, pipeline: Any, settings: PipelineSettings) -> tuple[int, ...]:
        """(C, H, W) of the latents of an image, (C, F, H, W) of a video, before any packing.

        Raises:
            ValueError: for a resolution that is no multiple of what the model needs.
        """
        config = getattr(pipeline, self.model_part).config
        factor: int = getattr(pipeline, self.scale_factor)
        resolution = settings.resolution or self.resolution
        if resolution is None:
            size = getattr(pipeline, "default_sample_size", None) or config.sample_size
            height, width = (size, size) if isinstance(size, int) else size
            resolution = (height * factor, width * factor)
        step = factor * (self.multiple or config.get("patch_size", 1))
        if any(side % step for side in resolution):
            near = tuple(max(round(side / step), 1) * step for side in resolution)
            raise ValueError(f"resolution={resolution} must be a multiple of {step} pixels; use {near}")
        return (self.latent_channels(config), resolution[0] // factor, resolution[1] // factor)

    def latent_channels(self, config: Any) -> int:
        """C, by the model's config."""
        channels: int = config.in_channels
        return channels

    def judged_frames(self, settings: PipelineSettings) -> int:
        """Frames of a video that rewards of images judge; 0: it makes pictures."""
        return 0

    def backbone(
        self, pipeline: Any, settings: PipelineSettings, map_shape: tuple[int, ...], **shared: Any
    ) -> LatentBackbone:
        """The family's adapter; `shared` are LatentBackbone's arguments but for model and latent shape."""
        own = {"latent_shape": map_shape} | self.arguments(pipeline, settings, map_shape)
        return self.backbone_class(getattr(pipeline, self.model_part), **own, **shared)

    def arguments(
        self, pipeline: Any, settings: PipelineSettings, map_shape: tuple[int, ...]
    ) -> dict[str, Any]:
        """What the family's adapter takes besides LatentBackbone's arguments."""
        return {}

    def unpack(self, latents: Tensor, map_shape: tuple[int, ...]) -> Tensor:
        """Maps (B, C, H, W) or (B, C, F, H, W) of the latents that the model takes."""
        return latents

    def unscaled(self, vae: Any, latents: Tensor) -> Tensor:
        """What the decoder takes: latents / scaling * std + mean + shift, as far as its config has these."""
        config = vae.config
        if getattr(config, "scaling_factor", None) is not None:
            latents = latents / config.scaling_factor
        if getattr(config, "latents_mean", None) is not None:
            mean, std = (
                to_device(torch.tensor(each), latents.device).view(1, -1, *(1,) * (latents.ndim - 2))
                for each in (config.latents_mean, config.latents_std)
            )
            latents = latents * std + mean
        if getattr(config, "shift_factor", None) is not None:
            latents = latents + config.shift_factor
        return latents


@dataclass(frozen=True, kw_only=True)
class PackedPipelines(PipelineFamily):
    """A family whose model takes a token for every 2x2 patch of the latents."""

    embedded_guidance: float = 1.0
    """What a distilled model is told where PipelineSettings say nothing."""
    multiple: int | None = 2

    def latent_channels(self, config: Any) -> int:
        return super().latent_channels(config) // 4

    def arguments(
        self, pipeline: Any, settings: PipelineSettings, map_shape: tuple[int, ...]
    ) -> dict[str, Any]:
        channels, height, width = map_shape
        grid = (height // 2, width // 2)
        return {
            "latent_shape": (grid[0] * grid[1], 4 * channels),
            "grid": grid,
            "embedded_guidance": self.embedded_guidance
            if settings.embedded_guidance is None
            else settings.embedded_guidance,
        }

    def unpack(self, latents: Tensor, map_shape: tuple[int, ...]) -> Tensor:
        _, height, width = map_shape
        return unpacked(latents, (height // 2, width // 2))


def _padded(tokens: Tensor, mask: str, length: int) -> Embeddings:
    """Tokens (1, L, D) and the mask of those that are a prompt's, behind which there are zeros."""
    missing = length - tokens.shape[1]
    present = tokens.new_ones(tokens.shape[:2], dtype=torch.bool)
    return {
        TOKENS: nn.functional.pad(tokens, (0, 0, 0, missing)),
        mask: nn.functional.pad(present, (0, missing)),
    }


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
        """(decoder(latents) / 2 + 1/2) clipped to [0, 1], float32."""
        maps = self.family.unscaled(self.vae, self.family.unpack(latents, self.map_shape)).to(self.vae.dtype)
        is_picture = maps.ndim == 4
        if self.family.has_frames and is_picture:
            maps = maps.unsqueeze(2)
        images: Tensor = self.vae.decode(maps, return_dict=False)[0]
        if self.family.has_frames:
            images = images.squeeze(2) if is_picture else images.transpose(1, 2)
        return (images.float() / 2 + 0.5).clamp(0, 1)


def prepare_vae(vae: Any, settings: PipelineSettings) -> Any:
    """The VAE, frozen, in the dtype and with the memory savings that are asked for."""
    vae.eval().requires_grad_(False)
    if settings.vae_dtype is not None:
        cast_weights(vae, getattr(torch, settings.vae_dtype))
    elif vae.dtype == torch.float16 and getattr(vae.config, "force_upcast", False):
        # SDXL's decoder overflows in float16.
        cast_weights(vae, torch.float32)
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


def linear_schedule(scheduler: Any, num_steps: int, tokens: int) -> dict[str, Any]:
    """What FLUX.1's pipeline gives its scheduler, and later ones too: linear levels, a dynamic shift."""
    return {"sigmas": linear_sigmas(num_steps)} | dynamic_shift(scheduler, tokens, max_shift=1.15)


def linear_sigmas(num_steps: int) -> Tensor:
    """(T,) float64 noise levels from 1 to 1 / T, before any shift."""
    return torch.linspace(1, 1 / num_steps, num_steps, dtype=torch.float64)
