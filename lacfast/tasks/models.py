"""The tiny backbones of the shapes task, diffusers' own classes in configurations made in code."""

from __future__ import annotations

from typing import Literal

import torch
from diffusers import SD3Transformer2DModel, UNet2DConditionModel
from torch import Tensor, nn

from lacfast.tasks.codec import CHANNELS, PATCH_SIZE
from lacfast.tasks.scenes import IMAGE_SIZE
from lacfast.tasks.text import WIDTH

BackboneName = Literal["dit", "unet"]
LATENT_SIZE = IMAGE_SIZE // PATCH_SIZE


def tiny_dit() -> SD3Transformer2DModel:
    """A DiT of 1.1 M parameters: 3 joint blocks of width 96 on 16 image tokens and the words."""
    return SD3Transformer2DModel(
        sample_size=LATENT_SIZE,
        patch_size=2,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        num_layers=3,
        attention_head_dim=24,
        num_attention_heads=4,
        joint_attention_dim=WIDTH,
        caption_projection_dim=96,
        pooled_projection_dim=WIDTH,
        pos_embed_max_size=LATENT_SIZE // 2,
        qk_norm="rms_norm",
    )


def tiny_unet() -> UNet2DConditionModel:
    """A UNet with cross attention on 8x8 and 4x4 maps."""
    return UNet2DConditionModel(
        sample_size=LATENT_SIZE,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        block_out_channels=(48, 96),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        mid_block_type="UNetMidBlock2DCrossAttn",
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=WIDTH,
        attention_head_dim=4,
        norm_num_groups=8,
    )


def predict_velocity(model: nn.Module, sample: Tensor, timestep: Tensor, tokens: Tensor, pooled: Tensor) -> Tensor:
    """v = noise - data at x = (1 - sigma) data + sigma noise, from either backbone.

    Args:
        sample: latents (B, C, H, W).
        timestep: 1000 sigma, (B,) float.
        tokens: (B, L, D) of the text encoder.
        pooled: (B, D) of the text encoder; a UNet has no use for it.
    """
    if isinstance(model, SD3Transformer2DModel):
        output = model(sample, tokens, pooled, timestep, return_dict=False)
    elif isinstance(model, UNet2DConditionModel):
        output = model(sample, timestep, tokens, return_dict=False)
    else:
        raise ValueError(f"no velocity from a {type(model).__name__}; use SD3Transformer2DModel or UNet2DConditionModel")
    velocity: Tensor = output[0]
    return velocity


def initialise(model: nn.Module, generator: torch.Generator) -> None:
    """Draws all weights anew from `generator`, so that no global random state decides them.

    Matrices and kernels: uniform in +-1/sqrt(fan in), as torch's own layers; vectors keep their constants, other biases
    become zero.
    """
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                bound = module.weight[0].numel() ** -0.5
                module.weight.uniform_(-bound, bound, generator=generator)
                if module.bias is not None:
                    module.bias.zero_()
