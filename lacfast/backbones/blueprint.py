"""A pipeline without its weights: its modules on the meta device, to count what training costs."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from torch import nn

from lacfast.backbones.latent import LatentBackbone
from lacfast.backbones.loading import load_backbone
from lacfast.backbones.pipelines import PipelineSettings
from lacfast.config import LoRAConfig
from lacfast.records import Conditioning


def load_blueprint(
    source: str | Path,
    *,
    dtype: torch.dtype | None = None,
    lora: LoRAConfig | None = None,
    settings: PipelineSettings | None = None,
) -> LatentBackbone:
    """The backbone of a pipeline's directory or hub id on the meta device; only its configs are read.

    Args:
        source: directory or hub id of a diffusers pipeline.
        dtype: that the model would run in.
        lora: the adapter that would be trained.
        settings: resolution and the like.

    Raises:
        ValueError: when the configs cannot be read.
    """
    try:
        description = DiffusionPipeline.load_config(str(source))
        parts = {
            name: _part(str(source), name, *entry)
            for name, entry in description.items()
            if not name.startswith("_") and isinstance(entry, list)
        }
    except OSError as error:
        raise ValueError(
            f"the configs of {str(source)!r} cannot be read: {error}; pass a pipeline's directory or hub id"
        ) from error
    pipeline = getattr(diffusers, description["_class_name"])(**parts)
    return load_backbone(pipeline, dtype=dtype, lora=lora, settings=settings)


def unconditional(backbone: LatentBackbone) -> Conditioning:
    """(1, ...) on the meta device; the cache of prompts wants numbers and cannot hold it."""
    tokens, pooled = backbone.prompt_encoder.encode_unconditional()
    return backbone.conditioning(tokens.to(backbone.dtype), pooled.to(backbone.dtype))


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
