"""Tiny untrained pipelines of every family, diffusers' and transformers' own classes, with tokenizers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    PNDMScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import Tensor
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from lacfast import PipelineSettings, SamplerConfig, load_backbone
from lacfast.backbones.latent import LatentBackbone
from lacfast.records import NoiseKey
from lacfast.rollout.sampler import RolloutSampler
from lacfast.runtime.graph import GraphRunner

FAMILIES = ("sd15", "sdxl", "sd3", "flux")
WORDS = ("a", "red", "blue", "cat", "dog", "of", "photo", "the", "tree", "sky")
PROMPTS = [
    "a red cat",
    "a blue dog",
    "photo of the sky",
    "the tree",
    "a cat of blue sky",
    "red",
    "dog",
    "a tree",
]
RESOLUTION = (16, 16)
CLIP_LENGTH = 12


def clip_tokenizer() -> CLIPTokenizer:
    """Letters, whole words of a tiny vocabulary, and the two special tokens."""
    letters = sorted(set("".join(WORDS)))
    vocabulary = {
        token: index for index, token in enumerate([*letters, *(f"{letter}</w>" for letter in letters)])
    }
    merges = []
    for word in WORDS:
        pieces = [*word[:-1], f"{word[-1]}</w>"]
        while len(pieces) > 1:
            merges.append((pieces[0], pieces[1]))
            pieces[:2] = [pieces[0] + pieces[1]]
            vocabulary.setdefault(pieces[0], len(vocabulary))
    for special in ("<|startoftext|>", "<|endoftext|>"):
        vocabulary[special] = len(vocabulary)
    unique = list(dict.fromkeys(merges))
    return CLIPTokenizer(vocab=vocabulary, merges=unique, model_max_length=CLIP_LENGTH)


def t5_tokenizer() -> T5Tokenizer:
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    pieces += [(f"▁{word}", -1.0) for word in WORDS]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=CLIP_LENGTH)


def clip_encoder(*, projected: bool, width: int = 16) -> CLIPTextModel | CLIPTextModelWithProjection:
    tokenizer = clip_tokenizer()
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=CLIP_LENGTH,
        projection_dim=width,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModelWithProjection(config) if projected else CLIPTextModel(config)


def t5_encoder(width: int = 32) -> T5EncoderModel:
    config = T5Config(
        vocab_size=len(t5_tokenizer()), d_model=width, d_kv=8, d_ff=2 * width, num_layers=1, num_heads=2
    )
    return T5EncoderModel(config)


def vae(channels: int, **config: Any) -> AutoencoderKL:
    """Halves the picture once."""
    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=channels,
        norm_num_groups=4,
        layers_per_block=1,
        sample_size=16,
        **config,
    )


def unet(**config: Any) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        attention_head_dim=4,
        norm_num_groups=4,
        **config,
    )


def sd15(**scheduler: Any) -> StableDiffusionPipeline:
    """With the scheduler and its settings that SD 1.5 is published with."""
    return StableDiffusionPipeline(
        vae=vae(4, scaling_factor=0.18215),
        text_encoder=clip_encoder(projected=False),
        tokenizer=clip_tokenizer(),
        unet=unet(cross_attention_dim=16),
        scheduler=PNDMScheduler(**(sd_noise(skip_prk_steps=True) | scheduler)),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def sd_noise(**changes: Any) -> dict[str, Any]:
    """The noise schedule of SD 1.x and SDXL."""
    settings = {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "steps_offset": 1,
    }
    return settings | changes


def sdxl() -> StableDiffusionXLPipeline:
    return StableDiffusionXLPipeline(
        vae=vae(4, scaling_factor=0.13025, force_upcast=True),
        text_encoder=clip_encoder(projected=False),
        text_encoder_2=clip_encoder(projected=True),
        tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer(),
        unet=unet(
            cross_attention_dim=32,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=16 + 6 * 8,
        ),
        scheduler=EulerDiscreteScheduler(**sd_noise(timestep_spacing="leading")),
        add_watermarker=False,
    )


def sd3() -> StableDiffusion3Pipeline:
    return StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=3,
            attention_head_dim=8,
            num_attention_heads=4,
            caption_projection_dim=32,
            joint_attention_dim=32,
            pooled_projection_dim=32,
            pos_embed_max_size=8,
            qk_norm="rms_norm",
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae(
            4, scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False, use_post_quant_conv=False
        ),
        text_encoder=clip_encoder(projected=True),
        tokenizer=clip_tokenizer(),
        text_encoder_2=clip_encoder(projected=True),
        tokenizer_2=clip_tokenizer(),
        text_encoder_3=t5_encoder(),
        tokenizer_3=t5_tokenizer(),
    )


def flux() -> FluxPipeline:
    return FluxPipeline(
        transformer=FluxTransformer2DModel(
            patch_size=1,
            in_channels=16,
            num_layers=1,
            num_single_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            pooled_projection_dim=16,
            guidance_embeds=True,
            axes_dims_rope=(4, 6, 6),
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(
            shift=3.0, use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15
        ),
        vae=vae(
            4, scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False
        ),
        text_encoder=clip_encoder(projected=False),
        tokenizer=clip_tokenizer(),
        text_encoder_2=t5_encoder(),
        tokenizer_2=t5_tokenizer(),
    )


BUILDERS = {"sd15": sd15, "sdxl": sdxl, "sd3": sd3, "flux": flux}


def tiny_pipeline(family: str, *, seed: int = 0) -> Any:
    """A pipeline whose output depends on everything that it is given."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipeline: Any = BUILDERS[family]()
        # Zero-initialised modulation would hide the timestep and the prompt.
        model = pipeline.unet if hasattr(pipeline, "unet") else pipeline.transformer
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn(parameter.shape))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def saved_pipeline(family: str, directory: Path) -> Path:
    """The directory of a saved tiny pipeline."""
    tiny_pipeline(family).save_pretrained(directory)
    return directory


def load_pipeline(directory: Path) -> Any:
    """Through plain diffusers."""
    pipeline = DiffusionPipeline.from_pretrained(directory)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def use_ddim(pipeline: Any) -> None:
    """Give a UNet's pipeline DDIM, as a user of DDIM does."""
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)


SETTINGS = PipelineSettings(resolution=RESOLUTION)
STEPS = 4


def backbone_of(pipeline: Any, **arguments: Any) -> LatentBackbone:
    return load_backbone(pipeline, settings=SETTINGS, **arguments)


def ode_images(backbone: LatentBackbone, prompts: list[str], guidance_scale: float) -> tuple[Tensor, Tensor]:
    """First latents and images of our sampler without noise."""
    config = SamplerConfig(kind="ode", noise_level=0.0, num_steps=STEPS, guidance_scale=guidance_scale)
    rollout = RolloutSampler(backbone, None, GraphRunner()).sample(
        backbone.transition_table(config),
        prompts,
        [{}] * len(prompts),
        NoiseKey.create(0, range(len(prompts))),
        guidance_scale=guidance_scale,
    )
    return rollout.latents[0], backbone.decode(rollout.clean_latents)


def own_call(pipeline: Any, prompts: list[str], latents: Tensor, guidance_scale: float) -> Tensor:
    """Images of the pipeline's own __call__."""
    arguments: dict[str, Any] = {"guidance_scale": guidance_scale}
    if type(pipeline).__name__ == "FluxPipeline":
        # FLUX tells a distilled model its guidance; true_cfg_scale is the classifier-free one.
        arguments = {"true_cfg_scale": guidance_scale, "negative_prompt": [""] * len(prompts)}
    images: Tensor = pipeline(
        prompts,
        height=RESOLUTION[0],
        width=RESOLUTION[1],
        num_inference_steps=STEPS,
        latents=latents,
        output_type="pt",
        **arguments,
    ).images
    return images
