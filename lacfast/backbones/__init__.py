"""Adapters from diffusers' pipelines to the trainer's backbone protocol: the only files that know them."""

from __future__ import annotations

from lacfast.backbones.families import PIPELINES
from lacfast.backbones.loading import MODELS, adapt, adapt_pretrained, load_backbone
from lacfast.backbones.publishing import push_to_hub
from lacfast.config import PipelineSettings

__all__ = [
    "MODELS",
    "PIPELINES",
    "PipelineSettings",
    "adapt",
    "adapt_pretrained",
    "load_backbone",
    "push_to_hub",
]
