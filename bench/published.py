"""Published models in full size without their weights, to count what they cost.

Configurations: those of the models' repositories on the Hugging Face hub.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
import transformers
from torch import nn

from lacfast.backbones import PipelineSettings, load_backbone
from lacfast.backbones.latent import LatentBackbone
from lacfast.config import LoRAConfig
from lacfast.records import Conditioning


@dataclass(frozen=True)
class PublishedModel:
    """A model as it is trained here: with a LoRA, in bfloat16."""

    title: str
    parameters: int
    """Number of the denoising model's parameters, as published."""
    pipeline: Callable[[], Any]
    """Builds it without text encoders and tokenizers."""
    text_encoders: tuple[Callable[[], nn.Module], ...]
    tokens: int
    """Tokens of a prompt, as the denoising model reads them."""
    token_dim: int
    pooled_dim: int
    """0 where the model has no pooled embedding."""
    resolution: tuple[int, int]

    def backbone(self, *, device: str = "meta", lora_rank: int = 32) -> LatentBackbone:
        """The adapted model; on the meta device it takes no memory."""
        with torch.device(device):
            pipeline = self.pipeline()
        return load_backbone(
            pipeline,
            dtype=torch.bfloat16,
            lora=LoRAConfig(rank=lora_rank),
            settings=PipelineSettings(resolution=self.resolution),
        )

    def conditioning(self, backbone: LatentBackbone, batch: int) -> Conditioning:
        """Conditioning of `batch` prompts, without values."""
        shapes = ((batch, self.tokens, self.token_dim), (batch, self.pooled_dim))
        tokens, pooled = (
            torch.empty(shape, device=backbone.device, dtype=backbone.dtype) for shape in shapes
        )
        return backbone.conditioning(tokens, pooled)

    def encode(self) -> None:
        """One prompt through all text encoders, on the meta device."""
        for build in self.text_encoders:
            with torch.device("meta"):
                encoder = build()
                is_t5 = isinstance(encoder, transformers.T5EncoderModel)
                length = self.tokens - 77 * (len(self.text_encoders) == 3) if is_t5 else 77
                encoder(torch.zeros(1, length, dtype=torch.int64))


def _clip_l() -> nn.Module:
    return transformers.CLIPTextModel(
        transformers.CLIPTextConfig(
            hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12
        )
    )


def _clip_bigg() -> nn.Module:
    return transformers.CLIPTextModelWithProjection(
        transformers.CLIPTextConfig(
            hidden_size=1280,
            intermediate_size=5120,
            num_hidden_layers=32,
            num_attention_heads=20,
            projection_dim=1280,
            hidden_act="gelu",
        )
    )


def _t5_xxl() -> nn.Module:
    return transformers.T5EncoderModel(
        transformers.T5Config(
            d_model=4096,
            d_kv=64,
            d_ff=10240,
            num_layers=24,
            num_heads=64,
            feed_forward_proj="gated-gelu",
        )
    )


def _vae(channels: int, **config: Any) -> diffusers.AutoencoderKL:
    return diffusers.AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=channels,
        **config,
    )


def _ddim() -> diffusers.DDIMScheduler:
    return diffusers.DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1, clip_sample=False
    )


def _sd15() -> Any:
    unet = diffusers.UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
    return diffusers.StableDiffusionPipeline(
        vae=_vae(4, scaling_factor=0.18215),
        text_encoder=None,
        tokenizer=None,
        unet=unet,
        scheduler=_ddim(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _sdxl() -> Any:
    unet = diffusers.UNet2DConditionModel(
        sample_size=128,
        block_out_channels=(320, 640, 1280),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=[1, 2, 10],
        attention_head_dim=[5, 10, 20],
        cross_attention_dim=2048,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    )
    return diffusers.StableDiffusionXLPipeline(
        vae=_vae(4, scaling_factor=0.13025),
        text_encoder=None,
        text_encoder_2=None,
        tokenizer=None,
        tokenizer_2=None,
        unet=unet,
        scheduler=_ddim(),
        add_watermarker=False,
    )


def _sd35_medium() -> Any:
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=128,
        patch_size=2,
        in_channels=16,
        out_channels=16,
        num_layers=24,
        attention_head_dim=64,
        num_attention_heads=24,
        joint_attention_dim=4096,
        caption_projection_dim=1536,
        pooled_projection_dim=2048,
        pos_embed_max_size=384,
        dual_attention_layers=tuple(range(13)),
        qk_norm="rms_norm",
    )
    return diffusers.StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=_wide_vae(1.5305, 0.0609),
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        text_encoder_3=None,
        tokenizer_3=None,
    )


def _flux_dev() -> Any:
    transformer = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=64,
        num_layers=19,
        num_single_layers=38,
        attention_head_dim=128,
        num_attention_heads=24,
        joint_attention_dim=4096,
        pooled_projection_dim=768,
        guidance_embeds=True,
    )
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(
        shift=3.0, use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15
    )
    return diffusers.FluxPipeline(
        transformer=transformer,
        scheduler=scheduler,
        vae=_wide_vae(0.3611, 0.1159),
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
    )


def _wide_vae(scaling_factor: float, shift_factor: float) -> diffusers.AutoencoderKL:
    """The decoder of 16 channels that SD3 and FLUX have."""
    return _vae(
        16,
        scaling_factor=scaling_factor,
        shift_factor=shift_factor,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


PUBLISHED = {
    "sd15": PublishedModel("SD1.5, 512 px", 859_520_964, _sd15, (_clip_l,), 77, 768, 0, (512, 512)),
    "sdxl": PublishedModel(
        "SDXL, 1024 px", 2_567_463_684, _sdxl, (_clip_l, _clip_bigg), 77, 2048, 1280, (1024, 1024)
    ),
    "sd35_medium": PublishedModel(
        "SD3.5-M, 512 px",
        2_243_171_520,
        _sd35_medium,
        (_clip_l, _clip_bigg, _t5_xxl),
        77 + 256,
        4096,
        2048,
        (512, 512),
    ),
    "flux_dev": PublishedModel(
        "FLUX.1-dev, 512 px",
        11_901_408_320,
        _flux_dev,
        (_clip_l, _t5_xxl),
        512,
        4096,
        768,
        (512, 512),
    ),
}
