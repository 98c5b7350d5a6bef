"""Tiny untrained pipelines of every family, diffusers' and transformers' own classes, with tokenizers."""

from __future__ import annotations

import inspect
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    AutoencoderKLWan,
    DDIMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    PNDMScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Gemma2Config,
    Gemma2Model,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
    UMT5Config,
    UMT5EncoderModel,
)

from lacfast import PipelineSettings, SamplerConfig, load_backbone
from lacfast.backbones.latent import LatentBackbone
from lacfast.backbones.sana import INSTRUCTION
from lacfast.records import NoiseKey
from lacfast.rollout.sampler import RolloutSampler
from lacfast.runtime.graph import GraphRunner

FAMILIES = (
    *("sd15", "sdxl", "sd3", "flux", "flux2", "flux2_klein"),
    *("qwen_image", "z_image", "sana", "pixart", "wan"),
)
DDIM_FAMILIES = ("sd15", "sdxl", "pixart")
"""Those that predict the noise."""
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
LENGTH = 16
"""Tokens that prompts are padded to by families that pad."""


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


def qwen_tokenizer(*texts: str) -> Qwen2Tokenizer:
    """Bytes, and each word of `texts` and WORDS as one token, alone and behind a space."""
    specials = ["<|im_start|>", "<|im_end|>"]
    empty = Qwen2Tokenizer(vocab={"<|endoftext|>": 0}).backend_tokenizer.pre_tokenizer
    plain = " ".join((*WORDS, *texts, *WORDS))
    for special in specials:
        plain = plain.replace(special, "")
    vocabulary, merges = {"<|endoftext|>": 0}, dict[tuple[str, str], None]()
    for character in sorted(ByteLevel.alphabet()):
        vocabulary[character] = len(vocabulary)
    for piece, _ in empty.pre_tokenize_str(plain):
        for end in range(2, len(piece) + 1):
            vocabulary.setdefault(piece[:end], len(vocabulary))
            merges.setdefault((piece[: end - 1], piece[end - 1]))
    return Qwen2Tokenizer(vocab=vocabulary, merges=list(merges), additional_special_tokens=specials)


def language_model(tokenizer: Any, *, layers: int = 1, width: int = 32, **config: Any) -> dict[str, Any]:
    """Settings of a decoder of text."""
    settings = {
        "vocab_size": len(tokenizer),
        "hidden_size": width,
        "intermediate_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 1024,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
    }
    return settings | config


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
            num_layers=2,
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


def flux2() -> Flux2Pipeline:
    tokenizer = qwen_tokenizer()
    # The system message would fill the tiny length.
    tokenizer.chat_template = "{{ messages[-1]['content'][0]['text'] }}"
    vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    text = {"model_type": "mistral"} | language_model(tokenizer, layers=30, width=8, head_dim=4)
    return Flux2Pipeline(
        transformer=flux2_transformer(guidance_embeds=True),
        text_encoder=Mistral3ForConditionalGeneration(Mistral3Config(text_config=text, vision_config=vision)),
        tokenizer=tokenizer,
        **flux2_parts(),
    )


def flux2_klein() -> Flux2KleinPipeline:
    tokenizer = qwen_tokenizer()
    tokenizer.chat_template = "<|im_start|>{{ messages[-1]['content'] }}<|im_end|>"
    return Flux2KleinPipeline(
        transformer=flux2_transformer(guidance_embeds=False),
        text_encoder=Qwen3ForCausalLM(
            Qwen3Config(**language_model(tokenizer, layers=27, width=8, head_dim=4))
        ),
        tokenizer=tokenizer,
        **flux2_parts(),
    )


def flux2_transformer(*, guidance_embeds: bool) -> Flux2Transformer2DModel:
    model = Flux2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        timestep_guidance_channels=16,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=guidance_embeds,
    )
    # Without a bias its gates would nearly close the blocks.
    for name, parameter in model.named_parameters():
        if "stream_modulation" in name:
            parameter.data.mul_(8)
    return model


def flux2_parts() -> dict[str, Any]:
    decoder = AutoencoderKLFlux2(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        layers_per_block=1,
    )
    decoder.bn.running_mean.copy_(torch.linspace(-0.5, 0.5, 16))
    decoder.bn.running_var.copy_(torch.linspace(0.5, 2.0, 16))
    return {
        "vae": decoder,
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
    }


QWEN_TEMPLATE = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, "
    "spatial relationships of the objects and background:<|im_end|>\n<|im_start|>user\n"
    "<|im_end|>\n<|im_start|>assistant\n"
)


def qwen_image() -> QwenImagePipeline:
    tokenizer = qwen_tokenizer(QWEN_TEMPLATE)
    rotary = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4}
    vision = {"depth": 1, "hidden_size": 8, "intermediate_size": 8, "num_heads": 1, "out_hidden_size": 32}
    return QwenImagePipeline(
        transformer=QwenImageTransformer2DModel(
            patch_size=2,
            in_channels=16,
            out_channels=4,
            num_layers=3,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            axes_dims_rope=(4, 6, 6),
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True,
            base_shift=0.5,
            max_shift=0.9,
            max_image_seq_len=8192,
            shift_terminal=0.02,
            time_shift_type="exponential",
        ),
        vae=AutoencoderKLQwenImage(
            base_dim=8,
            z_dim=4,
            dim_mult=[1, 1],
            num_res_blocks=1,
            temperal_downsample=[False],
            latents_mean=[0.1, -0.2, 0.3, 0.0],
            latents_std=[2.0, 1.5, 1.0, 0.5],
        ),
        text_encoder=Qwen2_5_VLForConditionalGeneration(
            Qwen2_5_VLConfig(
                text_config=language_model(tokenizer, rope_scaling=rotary, rope_parameters=rotary),
                vision_config=vision,
            )
        ),
        tokenizer=tokenizer,
    )


def z_image() -> ZImagePipeline:
    tokenizer = qwen_tokenizer()
    tokenizer.chat_template = "<|im_start|>{{ messages[-1]['content'] }}<|im_end|>"
    return ZImagePipeline(
        transformer=ZImageTransformer2DModel(
            in_channels=4,
            dim=32,
            n_layers=2,
            n_refiner_layers=1,
            n_heads=2,
            n_kv_heads=2,
            cap_feat_dim=16,
            axes_dims=[4, 6, 6],
            axes_lens=[1024, 16, 16],
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae(
            4, scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False
        ),
        text_encoder=Qwen3Model(Qwen3Config(**language_model(tokenizer, layers=2, width=16, head_dim=8))),
        tokenizer=tokenizer,
    )


def sana() -> SanaPipeline:
    tokenizer = qwen_tokenizer(*INSTRUCTION)
    return SanaPipeline(
        transformer=SanaTransformer2DModel(
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=16,
            num_layers=2,
            num_cross_attention_heads=2,
            cross_attention_head_dim=16,
            cross_attention_dim=32,
            caption_channels=16,
            sample_size=8,
        ),
        scheduler=DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
        vae=AutoencoderDC(
            latent_channels=4,
            attention_head_dim=4,
            encoder_block_out_channels=(8, 8),
            decoder_block_out_channels=(8, 8),
            encoder_layers_per_block=(1, 1),
            decoder_layers_per_block=(1, 1),
            encoder_qkv_multiscales=((), ()),
            decoder_qkv_multiscales=((), ()),
            scaling_factor=0.41407,
        ),
        text_encoder=Gemma2Model(Gemma2Config(**language_model(tokenizer, width=16, head_dim=8))),
        tokenizer=tokenizer,
    )


def pixart() -> PixArtSigmaPipeline:
    return PixArtSigmaPipeline(
        transformer=PixArtTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=16,
            in_channels=4,
            out_channels=8,
            num_layers=2,
            cross_attention_dim=32,
            sample_size=8,
            caption_channels=32,
        ),
        scheduler=DPMSolverMultistepScheduler(beta_start=0.0001, beta_end=0.02, beta_schedule="linear"),
        vae=vae(4, scaling_factor=0.13025),
        text_encoder=t5_encoder(),
        tokenizer=t5_tokenizer(),
    )


FRAMES = 5
"""Of a tiny video, which are two latent frames."""


def wan(**arguments: Any) -> WanPipeline:
    return WanPipeline(
        transformer=WanTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=16,
            in_channels=4,
            out_channels=4,
            text_dim=32,
            freq_dim=16,
            ffn_dim=64,
            num_layers=2,
            rope_max_seq_len=32,
        ),
        scheduler=UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
        vae=AutoencoderKLWan(
            base_dim=8,
            z_dim=4,
            dim_mult=[1, 1, 1],
            num_res_blocks=1,
            temperal_downsample=[True, True],
            latents_mean=[0.1, -0.2, 0.3, 0.0],
            latents_std=[2.0, 1.5, 1.0, 0.5],
            scale_factor_temporal=4,
            scale_factor_spatial=4,
        ),
        text_encoder=UMT5EncoderModel(
            UMT5Config(vocab_size=len(t5_tokenizer()), d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=2)
        ),
        tokenizer=t5_tokenizer(),
        **arguments,
    )


BUILDERS = {
    "sd15": sd15,
    "sdxl": sdxl,
    "sd3": sd3,
    "flux": flux,
    "flux2": flux2,
    "flux2_klein": flux2_klein,
    "qwen_image": qwen_image,
    "z_image": z_image,
    "sana": sana,
    "pixart": pixart,
    "wan": wan,
}


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


def load_as_card_says(saved: Path, base: Path) -> Any:
    """The pipeline that a saved model's README.md makes, line by line, in plain diffusers and peft."""
    code = (saved / "README.md").read_text(encoding="utf-8").partition("```python\n")[2].partition("```")[0]
    made: dict[str, Any] = {}
    exec(code.replace('"THIS_MODEL"', repr(str(saved))).replace("BASE", repr(str(base))), made)
    made["pipeline"].set_progress_bar_config(disable=True)
    return made["pipeline"]


def use_first_order(pipeline: Any) -> None:
    """Give a pipeline the steps of our sampler without noise: DDIM, or a solver in its first order."""
    scheduler = pipeline.scheduler
    if "solver_order" in scheduler.config:
        # UniPC's corrector is of an order more.
        first = {"solver_order": 1, "disable_corrector": list(range(STEPS))}
        pipeline.scheduler = type(scheduler).from_config(scheduler.config, **first)
    elif type(scheduler).__name__ != "FlowMatchEulerDiscreteScheduler":
        pipeline.scheduler = DDIMScheduler.from_config(scheduler.config, clip_sample=False)


SETTINGS = PipelineSettings(resolution=RESOLUTION, max_sequence_length=LENGTH)
VIDEOS = ("wan",)
STEPS = 4


def settings_of(family: str, **changes: Any) -> PipelineSettings:
    """The tests' settings of a family, as far as it reads them: CLIP has one length."""
    own: dict[str, Any] = {"num_frames": FRAMES} if family in VIDEOS else {}
    if family in ("sd15", "sdxl"):
        own["max_sequence_length"] = None
    return replace(SETTINGS, **own | changes)


def backbone_of(
    pipeline: Any, *, resolution: tuple[int, int] = RESOLUTION, **arguments: Any
) -> LatentBackbone:
    has_unet = (pipeline / "unet").is_dir() if isinstance(pipeline, Path) else hasattr(pipeline, "unet")
    family = "wan" if isinstance(pipeline, WanPipeline) else "sd15" if has_unet else ""
    return load_backbone(pipeline, settings=settings_of(family, resolution=resolution), **arguments)


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


def own_call(
    pipeline: Any,
    prompts: list[str],
    latents: Tensor,
    guidance_scale: float,
    *,
    resolution: tuple[int, int] = RESOLUTION,
    **more: Any,
) -> Tensor:
    """Images, or videos, of the pipeline's own __call__."""
    arguments: dict[str, Any] = {"guidance_scale": guidance_scale}
    if type(pipeline).__name__ in EMPTY_PROMPTS:
        # There guidance_scale is told to a distilled model; true_cfg_scale is the classifier-free one.
        empty = EMPTY_PROMPTS[type(pipeline).__name__]
        arguments = {"true_cfg_scale": guidance_scale, "negative_prompt": [empty] * len(prompts)}
    parameters = inspect.signature(type(pipeline).__call__).parameters
    if "use_resolution_binning" in parameters:
        arguments["use_resolution_binning"] = False
        # SANA's wants sides that its own autoencoder's factor divides.
        pipeline.check_inputs = lambda *_: None
    if isinstance(pipeline, WanPipeline):
        # It wants sides that its own autoencoder's factor divides.
        pipeline.check_inputs = lambda *_: None
        arguments["num_frames"] = FRAMES
    if "max_sequence_length" in inspect.signature(type(pipeline).__call__).parameters:
        arguments["max_sequence_length"] = LENGTH
    if type(pipeline).__name__ == "ZImagePipeline":
        # It counts guidance from none at all.
        arguments = {"guidance_scale": guidance_scale - 1, "max_sequence_length": LENGTH}
    if type(pipeline).__name__ == "Flux2Pipeline":
        arguments = {"guidance_scale": 4.0, "max_sequence_length": LENGTH}
    if type(pipeline).__name__.startswith("Flux2"):
        # It takes maps of patches.
        rows, columns = (side // 4 for side in resolution)
        latents = latents.mT.unflatten(2, (rows, columns))
    made = pipeline(
        prompt=list(prompts),
        height=resolution[0],
        width=resolution[1],
        num_inference_steps=STEPS,
        latents=latents,
        output_type="pt",
        **arguments | more,
    )
    images: Tensor = made.frames if isinstance(pipeline, WanPipeline) else made.images
    return images


def guided(family: str, scale: float) -> float:
    """The scale, or 1 where the family's pipeline has no guidance but what the model is told."""
    return 1.0 if family == "flux2" else scale


EMPTY_PROMPTS = {"FluxPipeline": "", "QwenImagePipeline": " "}
