"""Stable Diffusion XL: the UNet with a pooled prompt embedding and the picture's size beside the tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lacfast.backbones.latent import LatentBackbone
from lacfast.backbones.pipelines import (
    Embeddings,
    PipelineFamily,
    PipelineSettings,
    encoder_device,
)
from lacfast.backbones.scheduler_choice import ddim_scheduler
from lacfast.backbones.unet import UNetBackbone, unet_latent_map
from lacfast.records import Conditioning
from lacfast.transfer import to_device


class SDXLBackbone(UNetBackbone):
    """A model on latents (C, H, W) with tokens, a pooled embedding and time ids."""

    def __init__(self, model: Any, *args: Any, resolution: tuple[int, int], **kwargs: Any) -> None:
        """Arguments as LatentBackbone, and `resolution`: original and target size; the crop is none."""
        super().__init__(model, *args, **kwargs)
        self.time_ids = torch.tensor([*resolution, 0, 0, *resolution], dtype=torch.float32)

    def conditioning(self, tokens: Tensor, pooled: Tensor) -> Conditioning:
        return Conditioning(
            {
                "encoder_hidden_states": tokens,
                "text_embeds": pooled,
                "time_ids": to_device(self.time_ids, tokens.device).repeat(len(tokens), 1),
            }
        )

    def predict_with(
        self, model: nn.Module, sample: Tensor, timestep: Tensor, conditioning: Conditioning
    ) -> Tensor:
        added = {name: conditioning.tensors[name] for name in ("text_embeds", "time_ids")}
        tokens = conditioning.tensors["encoder_hidden_states"]
        output: Tensor = model(sample, timestep, tokens, added_cond_kwargs=added, return_dict=False)[0]
        return output


class SDXLPipelines(PipelineFamily):
    """StableDiffusionXLPipeline."""

    model_part = "unet"
    text_parts = ("text_encoder", "text_encoder_2")

    def encode(self, pipeline: Any, prompts: list[str], settings: PipelineSettings) -> Embeddings:
        tokens, _, pooled, _ = _encode_prompt(pipeline, prompts, settings, guided=False)
        return tokens, pooled

    def encode_unconditional(self, pipeline: Any, settings: PipelineSettings) -> Embeddings:
        _, tokens, _, pooled = _encode_prompt(pipeline, [""], settings, guided=True)
        return tokens, pooled

    def scheduler(self, scheduler: Any) -> Any:
        return ddim_scheduler(scheduler)

    def latent_map(self, pipeline: Any, resolution: tuple[int, int]) -> tuple[int, ...]:
        return unet_latent_map(pipeline, resolution)

    def backbone(
        self, pipeline: Any, settings: PipelineSettings, map_shape: tuple[int, ...], **shared: Any
    ) -> LatentBackbone:
        height, width = (side * pipeline.vae_scale_factor for side in map_shape[1:])
        return SDXLBackbone(pipeline.unet, latent_shape=map_shape, resolution=(height, width), **shared)


def _encode_prompt(
    pipeline: Any, prompts: list[str], settings: PipelineSettings, *, guided: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    embeddings: tuple[Tensor, Tensor, Tensor, Tensor] = pipeline.encode_prompt(
        prompts,
        device=encoder_device(pipeline.text_encoder_2),
        do_classifier_free_guidance=guided,
        # None makes zeros of it where the pipeline's config says so.
        negative_prompt=settings.negative_prompts,
    )
    return embeddings
