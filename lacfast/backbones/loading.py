"""load_backbone: from a diffusers pipeline, a directory or a hub id to what the trainer takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any, TypeVar

import torch
from diffusers import DiffusionPipeline
from torch import nn

from lacfast.backbone import build_critic
from lacfast.backbones import lora as adapters
from lacfast.backbones.attention import set_attention_backend
from lacfast.backbones.families import family_of, open_pipeline
from lacfast.backbones.fingerprint import Fingerprint
from lacfast.backbones.int8 import quantize_base
from lacfast.backbones.latent import LatentBackbone
from lacfast.backbones.parts import LatentCodec, PromptEncoder
from lacfast.backbones.pipelines import PipelineEncoder, VAECodec, prepare_vae
from lacfast.backbones.sd3 import SD3Backbone
from lacfast.backbones.storage import PartsStorage, PipelineStorage, read_description, saved_lora
from lacfast.backbones.trained_lora import LoRASource, read_lora
from lacfast.backbones.unet import UNetBackbone
from lacfast.backbones.wrappers import require_plain_model, require_plain_parts
from lacfast.checkpoint import give_critic, read_critic
from lacfast.config import CriticConfig, LoRAConfig, PipelineSettings, from_json
from lacfast.config.checks import unknown
from lacfast.config.critic import BASE_PRECISIONS
from lacfast.runtime.directories import recover, require_whole
from lacfast.tasks.pretraining import Pretrained
from lacfast.tasks.storage import load_pretrained, saved_class

MODELS: dict[str, type[LatentBackbone]] = {
    "SD3Transformer2DModel": SD3Backbone,
    "UNet2DConditionModel": UNetBackbone,
}
"""diffusers' model class -> adapter, for models that come without a pipeline."""


def adapt(
    model: Any,
    prompt_encoder: PromptEncoder,
    codec: LatentCodec,
    *,
    latent_shape: tuple[int, ...],
    scheduler: Any = None,
    lora: LoRAConfig | None = None,
) -> LatentBackbone:
    """The adapter of a diffusers model without a pipeline; arguments as LatentBackbone.

    Raises:
        ValueError: for a class without an adapter; the known ones are listed.
    """
    require_plain_model(model, "model")
    name = type(model).__name__
    if name not in MODELS:
        raise ValueError(f"no backbone for {name}; known: {', '.join(MODELS)}")
    return MODELS[name](
        model,
        prompt_encoder,
        codec,
        latent_shape=latent_shape,
        scheduler=scheduler,
        storage=PartsStorage(),
        lora=lora,
    )


def adapt_pretrained(
    pretrained: Pretrained, *, device: str | torch.device = "cpu", lora: LoRAConfig | None = None
) -> LatentBackbone:
    """The adapter of a tiny pretrained model of the shapes task."""
    model: Any = pretrained.model.to(device)
    size = model.config["sample_size"]
    return adapt(
        model,
        pretrained.text.to(device),
        pretrained.codec.to(device),
        latent_shape=(model.config["in_channels"], size, size),
        lora=lora,
    )


@dataclass(frozen=True)
class _Request:
    """The arguments of a call of load_backbone."""

    device: str | torch.device | None
    dtype: torch.dtype | None
    lora: LoRAConfig | LoRASource | None
    settings: PipelineSettings | None
    merged_loras: Mapping[str, float]
    base_precision: str


def load_backbone(
    source: Any,
    *,
    critic: CriticConfig | None = None,
    critic_file: str | Path | None = None,
    num_rewards: int = 1,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    lora: LoRAConfig | LoRASource | None = None,
    attention_backend: str | None = None,
    settings: PipelineSettings | None = None,
    base: Any = None,
    merged_loras: Mapping[str, float] | None = None,
    base_precision: str | None = None,
) -> LatentBackbone:
    """The backbone of a diffusers pipeline, or of a directory that was saved, with its critic if it has one.

    Args:
        source: a pipeline object (its model is trained in place), a directory of a pipeline, a directory
            that trainer.save or save_backbone wrote, or a hub id. Known pipelines are those of
            lacfast.backbones.PIPELINES.
        critic: make a new critic of this configuration instead of loading one. The trainer makes one too.
        critic_file: a trained critic for this model, say for a plain pipeline: critic.safetensors of a
            checkpoint, or a directory that holds one. None: the one beside a saved backbone.
        num_rewards: heads of the new critic.
        device: where to put the pipeline. None: where it is, the CPU for a directory.
        dtype: that the model runs in; trained weights are float32 all the same. A directory's text encoders
            and VAE are loaded in it. None: the pipeline's, float32 for a directory.
        lora: train this adapter, or train on one that was trained before: a directory, a file or a hub id in
            diffusers' or peft's layout, or one file of a repository, "owner/name/file.safetensors"; rank,
            alpha and modules are then its own. None: all weights, or the adapter of a directory that was
            saved with one. KLPenalty.anchor says whether the KL is measured from it or from its base.
        attention_backend: "sdpa", "xformers" or a name of diffusers' dispatcher. None: the model's own.
        settings: resolution, negative prompt, decoder. None: the pipeline's own, or the saved ones.
        base: the pipeline, directory or hub id that a saved LoRA belongs to, where it has moved.
        merged_loras: LoRA, as `lora` takes them -> weight, which are added to the frozen weights before
            anything is trained. None: those of a saved directory, or none.
        base_precision: "int8" keeps a LoRA's frozen base in a byte per weight, quantised on the CPU before
            it goes to `device`; "model" in its dtype. None: a saved directory's, else "model".

    Raises:
        ValueError: for a source that is none of these, a pipeline without an adapter, or settings that
            would be ignored.
    """
    if critic is not None and critic_file is not None:
        raise ValueError(f"critic={critic} and critic_file={str(critic_file)!r} are two critics; pass one")
    _require_kinds(
        dtype=(dtype, torch.dtype),
        lora=(lora, (LoRAConfig, str, PathLike)),
        settings=(settings, PipelineSettings),
        merged_loras=(merged_loras, Mapping),
    )
    if base_precision not in (None, *BASE_PRECISIONS):
        raise unknown("base_precision", base_precision, BASE_PRECISIONS)
    request = _Request(device, dtype, lora, settings, merged_loras or {}, base_precision or "")
    path = None if isinstance(source, DiffusionPipeline) else _path(source)
    # diffusers draws weights before it loads them; the caller's random state is none of its business.
    with torch.random.fork_rng(devices=[]):
        if path is None:
            backbone = _from_pipeline(source, request)
        elif path.is_dir():
            backbone = _from_directory(path, request, base)
        else:
            backbone = _from_pipeline(_opened(source, request), request)
    if attention_backend is not None:
        set_attention_backend(backbone.model, attention_backend)
    if critic is not None:
        backbone.critic = build_critic(backbone, num_rewards, critic)
    elif critic_file is not None:
        give_critic(backbone, Path(critic_file))
    elif path is not None and path.is_dir():
        backbone.critic = read_critic(backbone, path)
    return backbone


def _require_kinds(**arguments: tuple[Any, type | tuple[type, ...]]) -> None:
    for name, (value, kinds) in arguments.items():
        if value is not None and not isinstance(value, kinds):
            first, *_ = kinds if isinstance(kinds, tuple) else (kinds,)
            wanted = f"{first.__module__}.{first.__qualname__}"
            raise ValueError(f"{name}={value!r} is a {type(value).__name__}; pass a {wanted} or None")


def _path(source: Any) -> Path:
    if isinstance(source, str | PathLike):
        path = Path(source)
        if not path.exists():
            recover(path)
        return path
    what = "only a pipeline's model" if isinstance(source, nn.Module) else "no pipeline"
    raise ValueError(
        f"a {type(source).__name__} is {what}; pass the pipeline that holds it, its directory or its hub id: "
        "prompts are encoded and latents decoded with its other parts"
    )


def _from_directory(path: Path, request: _Request, base: Any) -> LatentBackbone:
    require_whole(path)
    description = read_description(path)
    if "pipeline" in description:
        return _from_saved(path, description, request, base)
    if (path / "model_index.json").exists():
        return _from_pipeline(_opened(path, request), request)
    if (path / "model" / "config.json").exists():
        return _from_parts(path, saved_lora(description), request)
    raise ValueError(
        f"{path} holds no model_index.json, model/config.json or lacfast.json; pass a diffusers pipeline's "
        "directory or one that trainer.save() or `lacfast demo` wrote"
    )


def _from_parts(path: Path, saved: LoRAConfig | None, request: _Request) -> LatentBackbone:
    name = saved_class(path)
    if name not in MODELS:
        raise ValueError(f"{path} holds a {name}, which has no backbone; known: {', '.join(MODELS)}")
    if request.settings is not None:
        raise ValueError(f"{path} holds no pipeline, so settings={request.settings} would be ignored")
    if request.base_precision == "int8":
        raise ValueError(f"{path} holds a tiny model, not a pipeline's; leave base_precision out")
    if request.merged_loras or isinstance(request.lora, str | PathLike):
        raise ValueError(
            f"{path} holds no pipeline, and only a pipeline's LoRA can be read beside its model; leave lora "
            "and merged_loras out: a saved directory has its own LoRA"
        )
    lora = _one_lora(saved, request.lora)
    backbone = adapt_pretrained(load_pretrained(path), device=request.device or "cpu", lora=lora)
    if saved is not None:
        _load_policy(backbone, path)
    return backbone


def _from_saved(path: Path, description: dict[str, Any], request: _Request, base: Any) -> LatentBackbone:
    """What PipelineStorage wrote: a whole pipeline, its model alone, or its LoRA."""
    saved = saved_lora(description)
    request = _Request(
        request.device,
        request.dtype or getattr(torch, description["dtype"]),
        _one_lora(saved, request.lora),
        request.settings or from_json(PipelineSettings, description["settings"]),
        request.merged_loras,
        request.base_precision or description.get("base_precision", "model"),
    )
    if (path / "model_index.json").exists():
        return _from_pipeline(_opened(path, request), request)
    # What was merged is in a whole pipeline's weights; earlier versions merged nothing.
    request = replace(request, merged_loras=request.merged_loras or description.get("merged_loras", {}))
    origin = base if base is not None else description["base"]
    if origin is None:
        raise ValueError(
            f"{path} does not know the {description['pipeline']} that it was trained on; "
            "pass that pipeline, its directory or its hub id as base="
        )
    pipeline = origin if isinstance(origin, DiffusionPipeline) else _opened(origin, request)
    backbone = _from_pipeline(pipeline, request)
    _load_policy(backbone, path)
    return backbone


def _opened(name: Any, request: _Request) -> Any:
    return open_pipeline(str(name), request.dtype, is_frozen=request.lora is not None)


def _load_policy(backbone: LatentBackbone, path: Path) -> None:
    backbone.load_policy(backbone.read_policy(path), f"model in {path}")


Asked = TypeVar("Asked", bound=LoRAConfig | LoRASource | None)


def _one_lora(saved: LoRAConfig | None, asked: Asked) -> LoRAConfig | Asked:
    if saved is not None and asked not in (None, saved):
        raise ValueError(
            f"the directory holds a LoRA of {saved}, so {asked} would be ignored; leave lora out"
        )
    return asked if saved is None else saved


def _from_pipeline(pipeline: Any, request: _Request) -> LatentBackbone:
    family = family_of(pipeline)
    settings = request.settings or PipelineSettings()
    family.require_read(settings, pipeline)
    require_plain_parts(pipeline.components, family.model_part)
    # Before weights are merged or quantised in place, which a backbone that has the adapter runs on.
    adapters.require_none(getattr(pipeline, family.model_part))
    is_quantized = request.base_precision == "int8"
    if is_quantized and request.lora is None:
        raise ValueError(
            "base_precision='int8' is of a frozen base, and without a LoRA all weights are trained; pass "
            "lora=LoRAConfig(), or leave base_precision out"
        )
    # A base that is quantised goes to the device when it is small.
    if request.device is not None and not is_quantized:
        pipeline.to(request.device)
    for name in family.text_parts:
        encoder: nn.Module | None = getattr(pipeline, name)
        if encoder is not None:
            encoder.eval().requires_grad_(False)
    trained = None
    if isinstance(request.lora, str | PathLike):
        trained = read_lora(request.lora, pipeline, family.model_part, family.text_parts)
    in_peft_layout = []
    for source, weight in request.merged_loras.items():
        merged = read_lora(source, pipeline, family.model_part, family.text_parts)
        merged.merge_into(pipeline, weight)
        in_peft_layout += [source] * merged.is_in_peft_layout
    scheduler = family.scheduler(pipeline.scheduler)
    weights = {name: getattr(pipeline, name) for name in (family.model_part, "vae", *family.text_parts)}
    fingerprint = Fingerprint.of(weights, scheduler)
    if is_quantized:
        model = weights[family.model_part]
        quantize_base(model, family.backbone_class.repeated_blocks, request.dtype or model.dtype)
        if request.device is not None:
            pipeline.to(request.device)
    map_shape = family.latent_map(pipeline, settings)
    backbone = family.backbone(
        pipeline,
        settings,
        map_shape,
        prompt_encoder=PipelineEncoder(pipeline, family, settings),
        codec=VAECodec(prepare_vae(pipeline.vae, settings), family, map_shape),
        scheduler=scheduler,
        storage=PipelineStorage(
            *(pipeline, family, settings, _origin(pipeline), fingerprint),
            *(request.merged_loras, in_peft_layout),
        ),
        lora=request.lora if trained is None else trained.config(family.model_part),
        dtype=request.dtype,
    )
    backbone.judged_frames = family.judged_frames(settings)
    if trained is not None:
        backbone.load_policy(trained.state(family.model_part), f"LoRA {trained.source}")
    return backbone


def _origin(pipeline: Any) -> str | None:
    """Directory or hub id that the pipeline was loaded from."""
    name = pipeline.config.get("_name_or_path")
    return str(Path(name).absolute()) if name and Path(name).is_dir() else name or None
