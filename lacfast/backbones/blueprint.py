"""A pipeline without its weights: its modules on the meta device, to count what training costs."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from torch import nn

from lacfast.backbones.families import PIPELINES
from lacfast.backbones.latent import LatentBackbone
from lacfast.backbones.loading import load_backbone
from lacfast.backbones.parts import Embeddings, empty_embeddings
from lacfast.backbones.prompt_cache import PromptCache
from lacfast.backbones.published import published_as
from lacfast.backbones.trained_lora import LoRASource
from lacfast.config import LoRAConfig, PipelineSettings
from lacfast.records import Conditioning


@dataclass(frozen=True)
class Blueprint:
    """A backbone on the meta device, and what else its pipeline holds in memory."""

    backbone: LatentBackbone
    decoder_bytes: int
    text_encoder_bytes: int

    def conditioning(self) -> Conditioning:
        """(1, ...) on the meta device; the cache of prompts wants numbers and cannot hold it."""
        return self.backbone.any_prompt()


def load_blueprint(
    source: str | Path,
    *,
    dtype: torch.dtype | None = None,
    lora: LoRAConfig | LoRASource | None = None,
    settings: PipelineSettings | None = None,
    base_precision: str = "model",
) -> Blueprint:
    """The blueprint of a pipeline's directory or hub id; only its configs are read.

    Those of the models that recipes train come with the package; for another hub id the hub is asked.

    Args:
        source: directory or hub id of a diffusers pipeline.
        dtype: that the model would run in.
        lora: the adapter that would be trained; a trained one is read for its rank and modules.
        settings: resolution and the like.
        base_precision: see load_backbone.

    Raises:
        ValueError: when the configs cannot be read.
    """
    published = None if Path(source).is_dir() else published_as(str(source))
    pipeline = published.build() if published is not None else _described(str(source))
    backbone = load_backbone(
        pipeline, dtype=dtype, lora=lora, settings=settings, base_precision=base_precision
    )
    family = PIPELINES[type(pipeline).__name__]
    shapes = (
        family.prompt_shapes(pipeline, settings or PipelineSettings())
        if published is None
        else published.prompt
    )
    if shapes is not None:
        backbone.prompts = PromptCache(ShapesOnly(shapes))
    encoders = [getattr(pipeline, name) for name in family.text_parts]
    return Blueprint(backbone, _bytes([pipeline.vae], dtype), _bytes(encoders, dtype))


class ShapesOnly:
    """A PromptEncoder that runs nothing: embeddings of known shapes on the meta device."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.shapes = shapes

    def encode(self, prompts: Sequence[str]) -> Embeddings:
        return empty_embeddings(self.shapes, len(prompts), device="meta")

    def encode_unconditional(self) -> Embeddings:
        return self.encode([""])

    def identity(self) -> None:
        """No file is worth while: there are no weights."""

    def set_aside(self) -> None:
        """Nothing: there are no weights."""

    def bring_back(self) -> None:
        """Nothing was set aside."""


def _described(source: str) -> Any:
    try:
        description = DiffusionPipeline.load_config(source)
        parts = {
            name: _part(source, name, *entry)
            for name, entry in description.items()
            if not name.startswith("_") and isinstance(entry, list)
        }
    except OSError as error:
        raise ValueError(
            f"the configs of {source!r} cannot be read: {error}; pass a pipeline's directory or hub id"
        ) from error
    return getattr(diffusers, description["_class_name"])(**parts)


def _bytes(modules: list[nn.Module | None], dtype: torch.dtype | None) -> int:
    """Size in `dtype`, which a directory's parts are loaded in; None is float32."""
    counts = [
        parameter.numel() for module in modules if module is not None for parameter in module.parameters()
    ]
    return sum(counts) * (dtype or torch.float32).itemsize


def _part(source: str, name: str, library: str | None, class_name: str | None) -> Any:
    """One component: modules without weights, tokenizers and schedulers as they are."""
    if library is None or class_name is None:
        return None
    kind = getattr(importlib.import_module(library), class_name)
    if not issubclass(kind, nn.Module):
        return kind.from_pretrained(source, subfolder=name)
    with torch.device("meta"):
        if library == "diffusers":
            return kind.from_config(kind.load_config(source, subfolder=name))
        return kind(kind.config_class.from_pretrained(source, subfolder=name))
