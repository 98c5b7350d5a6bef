"""FLUX.2: diffusers' Flux2Transformer2DModel on packed latents as actor and as critic trunk."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu
from torch import Tensor, nn

from lacfast.backbones.flux import LONGEST_PROMPT, FluxBackbone, Positions, image_ids
from lacfast.backbones.pipelines import PackedPipelines, linear_sigmas
from lacfast.backbones.transformer import JOINT_ATTENTION, Blocks
from lacfast.critic.trunk import Features
from lacfast.records import Conditioning


class Flux2Backbone(FluxBackbone):
    """A velocity model on packed latents, conditioned on prompt tokens."""

    lora_targets = (*JOINT_ATTENTION, "attn.to_qkv_mlp_proj")
    repeated_blocks = ("Flux2TransformerBlock", "Flux2SingleTransformerBlock")
    blocks = (
        Blocks("transformer_blocks", inputs=("temb_mod_img", "temb_mod_txt")),
        Blocks(
            "single_transformer_blocks",
            streams=("hidden_states",),
            inputs=("temb_mod",),
            prompt_at="before",
        ),
    )
    prompt_arguments = ("encoder_hidden_states",)

    def position_ids(self) -> tuple[Tensor, Tensor]:
        # Time, row, column and place in the prompt.
        image = nn.functional.pad(image_ids(self.grid), (0, 1))
        return image, nn.functional.pad(torch.arange(float(LONGEST_PROMPT))[:, None], (3, 0))

    def block_arguments(self) -> nn.Module:
        return JoinedPositions(self.model, *self.position_ids())

    def schedule_arguments(self, num_steps: int) -> dict[str, Any]:
        # Of the steps too, unlike FLUX.1's.
        shift = compute_empirical_mu(self.image_tokens, num_steps)
        is_dynamic = self.scheduler is not None and self.scheduler.config.get("use_dynamic_shifting", False)
        return {"sigmas": linear_sigmas(num_steps)} | ({"mu": shift} if is_dynamic else {})


class JoinedPositions(Positions):
    """Rotary embeddings for blocks that get prompt and image as one stream."""

    def forward(self, features: Features, conditioning: Conditioning) -> dict[str, Any]:
        return super().forward(features, conditioning) | {"encoder_hidden_states": None}


class Flux2Pipelines(PackedPipelines):
    """A family whose autoencoder normalises patches of 2x2 latents."""

    def unscaled(self, vae: Any, latents: Tensor) -> Tensor:
        mean, variance = (each.view(1, -1, 1, 1) for each in (vae.bn.running_mean, vae.bn.running_var))
        patches = nn.functional.pixel_unshuffle(latents, 2)
        scaled = patches * torch.sqrt(variance + vae.config.batch_norm_eps) + mean
        return nn.functional.pixel_shuffle(scaled, 2)


FLUX2_PIPELINES = Flux2Pipelines(
    backbone_class=Flux2Backbone,
    prompt_outputs={"encoder_hidden_states": 0},
    sequence_length=512,
    token_width="joint_attention_dim",
    embedded_guidance=4.0,
)
"""Flux2Pipeline: FLUX.2 dev (guidance embedding). Flux2KleinPipeline: its base guides classifier-free."""
