"""Stable Diffusion XL: the UNet with a pooled prompt embedding and the picture's size beside the tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lacfast.backbones.parts import Embeddings
from lacfast.backbones.pipelines import PipelineFamily
from lacfast.backbones.scheduler_choice import ddim_scheduler
from lacfast.backbones.unet import UNetBackbone
from lacfast.config import PipelineSettings
from lacfast.records import Conditioning
from lacfast.transfer import to_device


class SDXLBackbone(UNetBackbone):
    """A model on latents (C, H, W) with tokens, a pooled embedding and time ids."""

    prompt_arguments = ("encoder_hidden_states", "text_embeds")

    def __init__(self, model: Any, *args: Any, resolution: tuple[int, int], **kwargs: Any) -> None:
        """Arguments as LatentBackbone, and `resolution`: original and target size; the crop is none."""
        super().__init__(model, *args, **kwargs)
        self.time_ids = torch.tensor([*resolution, 0, 0, *resolution], dtype=torch.float32)

    def conditioning(self, embeddings: Embeddings) -> Conditioning:
        told = super().conditioning(embeddings)
        device = told.tensors["encoder_hidden_states"].device
        told.tensors["time_ids"] = to_device(self.time_ids, device).repeat(len(told), 1)
        return told

    def predict_with(
        self, model: nn.Module, sample: Tensor, timestep: Tensor, conditioning: Conditioning
    ) -> Tensor:
        added = {name: conditioning.tensors[name] for name in ("text_embeds", "time_ids")}
        tokens = conditioning.tensors["encoder_hidden_states"]
        output: Tensor = model(sample, timestep, tokens, added_cond_kwargs=added, return_dict=False)[0]
        return output


class SDXLPipelines(PipelineFamily):
    """A family that tells its model the picture's size."""

    def arguments(
        self, pipeline: Any, settings: PipelineSettings, map_shape: tuple[int, ...]
    ) -> dict[str, Any]:
        height, width = (side * pipeline.vae_scale_factor for side in map_shape[1:])
        return {"resolution": (height, width)}


SDXL_PIPELINES = SDXLPipelines(
    backbone_class=SDXLBackbone,
    model_part="unet",
    text_parts=("text_encoder", "text_encoder_2"),
    prompt_outputs={"encoder_hidden_states": 0, "text_embeds": 2},
    negative_outputs={"encoder_hidden_states": 1, "text_embeds": 3},
    empty_prompt=None,
    scheduler=ddim_scheduler,
)
"""StableDiffusionXLPipeline; without a negative prompt zeros are used where its config says so."""
