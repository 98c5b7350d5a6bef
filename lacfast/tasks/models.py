"""The tiny backbones of the shapes task, diffusers' own classes in configurations made in code."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from diffusers import SD3Transformer2DModel, UNet2DConditionModel
from torch import Tensor, nn

from lacfast.config.checks import Config, Count
from lacfast.tasks.codec import CHANNELS, PATCH_SIZE
from lacfast.tasks.task import BASE_SIZE
from lacfast.tasks.text import WIDTH

BackboneName = Literal["dit", "unet"]
LATENT_SIZE = BASE_SIZE // PATCH_SIZE
HEAD_DIM = 24


@dataclass(frozen=True, kw_only=True)
class ModelSize(Config):
    """How large the backbones are; the defaults are the tiny ones."""

    image_size: Count = BASE_SIZE
    """H = W of their pictures."""
    num_layers: Count = 3
    """Blocks of the DiT."""
    num_heads: Count = 4
    """Attention heads of the DiT; its width is HEAD_DIM times that."""
    channels: tuple[Count, Count] = (32, 64)
    """Channels of the UNet's two levels."""

    @property
    def latent_size(self) -> int:
        return self.image_size // PATCH_SIZE


TINY = ModelSize()
SMALL = ModelSize(image_size=64, num_layers=6, num_heads=8, channels=(64, 128))
"""Sizes for a GPU: a DiT of 7.8 M parameters on 64 tokens, a UNet of 4.0 M on 16x16 and 8x8 maps."""


def tiny_dit(size: ModelSize = TINY) -> SD3Transformer2DModel:
    """A DiT; TINY: 1.0 M parameters, 3 joint blocks of width 96 on 16 image tokens and the words."""
    build: Any = SD3Transformer2DModel
    model: SD3Transformer2DModel = build(
        sample_size=size.latent_size,
        patch_size=2,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        num_layers=size.num_layers,
        attention_head_dim=HEAD_DIM,
        num_attention_heads=size.num_heads,
        joint_attention_dim=WIDTH,
        caption_projection_dim=HEAD_DIM * size.num_heads,
        pooled_projection_dim=WIDTH,
        pos_embed_max_size=size.latent_size // 2,
        qk_norm="rms_norm",
    )
    return model


def tiny_unet(size: ModelSize = TINY) -> UNet2DConditionModel:
    """A UNet with cross attention to the words on its smaller maps; TINY: 1.0 M parameters, 8x8 and 4x4."""
    build: Any = UNet2DConditionModel
    model: UNet2DConditionModel = build(
        sample_size=size.latent_size,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        block_out_channels=size.channels,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        mid_block_type="UNetMidBlock2DCrossAttn",
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=WIDTH,
        attention_head_dim=4,
        norm_num_groups=8,
    )
    return model


def predict_velocity(
    model: nn.Module, sample: Tensor, timestep: Tensor, tokens: Tensor, pooled: Tensor
) -> Tensor:
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
        raise ValueError(f"no velocity from a {type(model).__name__}; use tiny_dit() or tiny_unet()")
    velocity: Tensor = output[0]
    return velocity


def tiny_backbone(name: BackboneName, *, generator: torch.Generator, size: ModelSize = TINY) -> nn.Module:
    """An untrained tiny backbone; every weight comes from `generator`, none from the global random state."""
    with torch.random.fork_rng(devices=[]):
        model: Any = tiny_dit(size) if name == "dit" else tiny_unet(size)
    _draw_weights(model, generator)
    if name == "dit":
        _draw_positions(model.pos_embed.pos_embed, generator)
        _start_as_identity(model)
    module: nn.Module = model
    return module


@torch.no_grad()
def _draw_weights(model: nn.Module, generator: torch.Generator) -> None:
    """Matrices and kernels uniform in +-1/sqrt(fan in), torch's own rule; their biases zero."""
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            bound = module.weight[0].numel() ** -0.5
            module.weight.uniform_(-bound, bound, generator=generator)
            if module.bias is not None:
                module.bias.zero_()


@torch.no_grad()
def _draw_positions(table: Tensor, generator: torch.Generator) -> None:
    """Replaces the sine table (1, S * S, D) by random row plus column codes of unit variance.

    On a 4x4 grid the sine table's low frequencies hardly differ from place to place, and the model learns
    patches long before it learns where they belong.
    """
    side = math.isqrt(table.shape[1])
    codes = torch.randn((2, side, table.shape[2]), generator=generator) * 0.5**0.5
    table.copy_((codes[0][:, None] + codes[1][None]).reshape(table.shape))


@torch.no_grad()
def _start_as_identity(model: Any) -> None:
    """Zero modulation at the start (adaLN-Zero, Peebles and Xie 2023): every block begins as the identity."""
    for name, module in model.named_modules():
        if name.endswith(("norm1.linear", "norm1_context.linear", "norm_out.linear")):
            assert isinstance(module, nn.Linear)
            module.weight.zero_()
