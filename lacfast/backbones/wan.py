"""Wan: diffusers' WanTransformer3DModel on latents of videos as actor and as critic trunk."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lacfast.backbones.lora import merged_copy
from lacfast.backbones.transformer import Blocks, CrossAttentionBackbone
from lacfast.backbones.videos import VideoPipelines
from lacfast.config import PipelineSettings
from lacfast.critic.trunk import Features
from lacfast.records import Conditioning


class WanBackbone(CrossAttentionBackbone):
    """A velocity model on latents (C, F, H, W) whose blocks read all of the prompt's tokens."""

    # flow_grpo's of Wan 2.1.
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0")
    repeated_blocks = ("WanTransformerBlock",)
    blocks = (Blocks("blocks", streams=("hidden_states",), inputs=("encoder_hidden_states", "temb")),)
    # Behind a prompt there are zeros, which the model was trained to read.
    prompt_arguments = ("encoder_hidden_states",)

    def block_arguments(self) -> nn.Module:
        return Positions(self.model, self.latent_shape)


class Positions(nn.Module):
    """Rotary embeddings of frames, rows and columns, for a branch's blocks."""

    def __init__(self, model: Any, latent_shape: tuple[int, ...]) -> None:
        super().__init__()
        self.embed = merged_copy(model.rope)
        # It reads the shape alone.
        self.like = torch.empty(1, *latent_shape, device="meta")

    def forward(self, features: Features, conditioning: Conditioning) -> dict[str, Any]:
        return {"rotary_emb": self.embed(self.like)}


class WanPipelines(VideoPipelines):
    """A family whose later versions have a model for high noise and another for low."""

    def require_read(self, settings: PipelineSettings, pipeline: Any) -> None:
        """
        Raises:
            ValueError: for two models, or one that is told a picture.
        """
        if pipeline.transformer is None or pipeline.transformer_2 is not None:
            raise ValueError(
                "the WanPipeline has two transformers, one for high noise and one for low, as Wan 2.2's of "
                "14B; here one model is trained: load Wan 2.1, or Wan2.2-TI2V-5B"
            )
        config = pipeline.transformer.config
        if config["image_dim"] is not None or config["in_channels"] != config["out_channels"]:
            raise ValueError(
                f"the WanTransformer3DModel takes a picture beside the prompt "
                f"(image_dim={config['image_dim']}, in_channels={config['in_channels']}); load a model that "
                "makes videos from prompts alone"
            )
        super().require_read(settings, pipeline)


WAN_PIPELINES = WanPipelines(
    backbone_class=WanBackbone,
    prompt_options={"do_classifier_free_guidance": False},
    prompt_outputs={"encoder_hidden_states": 0},
    sequence_length=512,
    token_width="text_dim",
    multiple=2,
    resolution=(480, 832),
    num_frames=81,
)
"""WanPipeline: Wan 2.1's text to video, and the 5B model of Wan 2.2."""
