"""Published models in full size without their weights, to count what they cost."""

from __future__ import annotations

import torch
import transformers

from lacfast.backbones import load_backbone
from lacfast.backbones.latent import LatentBackbone
from lacfast.backbones.parts import empty_embeddings
from lacfast.backbones.published import PublishedModel, published_models
from lacfast.config import LoRAConfig
from lacfast.records import Conditioning

ORDER = (
    *("sd15", "sdxl", "sd35_medium", "flux_dev", "flux2_dev", "flux2_klein", "qwen_image", "z_image"),
    *("sana", "pixart_sigma", "wan_1b", "wan_14b"),
)
PUBLISHED = {name: published_models()[name] for name in ORDER}
"""In the order of the table."""


def trained_backbone(model: PublishedModel, *, lora_rank: int = 32) -> LatentBackbone:
    """The model as it is trained here: with a LoRA, in bfloat16. On the meta device it takes no memory."""
    return load_backbone(
        model.build(text_encoders=False),
        dtype=torch.bfloat16,
        lora=LoRAConfig(rank=lora_rank),
        settings=model.settings,
    )


def prompt_conditioning(model: PublishedModel, backbone: LatentBackbone, batch: int) -> Conditioning:
    """Conditioning of `batch` prompts, without values."""
    embeddings = empty_embeddings(model.prompt, batch, device=backbone.device, dtype=backbone.dtype)
    return backbone.conditioning(embeddings)


def encode_prompt(model: PublishedModel) -> None:
    """One prompt through all text encoders, on the meta device."""
    encoders = model.text_encoders()
    for encoder in encoders:
        is_clip = isinstance(encoder, transformers.CLIPTextModel | transformers.CLIPTextModelWithProjection)
        # SD3 puts T5's tokens behind those of CLIP.
        length = 77 if is_clip else model.prompt["encoder_hidden_states"][0] - 77 * (len(encoders) == 3)
        encoder(torch.zeros(1, length, dtype=torch.int64, device="meta"))
