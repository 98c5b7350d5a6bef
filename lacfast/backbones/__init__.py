"""Adapters from diffusers' models to what the trainer asks of a backbone: the only files that know them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import torch

from lacfast.backbones.latent import LatentBackbone
from lacfast.backbones.sd3 import SD3Backbone
from lacfast.backbones.unet import UNetBackbone
from lacfast.checkpoint import read_critic
from lacfast.config import CriticConfig
from lacfast.critic import build_critic
from lacfast.protocols import LatentCodec, PromptEncoder
from lacfast.tasks.codec import PatchCodec
from lacfast.tasks.pretraining import Pretrained
from lacfast.tasks.text import WordEncoder

FAMILIES: dict[str, type[LatentBackbone]] = {
    "SD3Transformer2DModel": SD3Backbone,
    "UNet2DConditionModel": UNetBackbone,
}
"""diffusers' class name -> adapter."""


def adapt(
    model: Any,
    prompt_encoder: PromptEncoder,
    codec: LatentCodec,
    *,
    latent_shape: tuple[int, ...],
    scheduler: Any = None,
) -> LatentBackbone:
    """The adapter of a diffusers model; arguments as LatentBackbone.

    Raises:
        ValueError: for a class without an adapter; the known ones are listed.
    """
    name = type(model).__name__
    if name not in FAMILIES:
        raise ValueError(f"no backbone for {name}; known: {', '.join(FAMILIES)}")
    return FAMILIES[name](model, prompt_encoder, codec, latent_shape=latent_shape, scheduler=scheduler)


def adapt_pretrained(pretrained: Pretrained, *, device: str = "cpu") -> LatentBackbone:
    """The adapter of a tiny pretrained model of the shapes task."""
    return _adapt_tiny(pretrained.model, pretrained.text, pretrained.codec, device)


def _adapt_tiny(model: Any, text: WordEncoder, codec: PatchCodec, device: str) -> LatentBackbone:
    size = model.config["sample_size"]
    shape = (model.config["in_channels"], size, size)
    return adapt(model.to(device), text.to(device), codec.to(device), latent_shape=shape)


def load_backbone(
    directory: str | Path, *, critic: CriticConfig | None = None, num_rewards: int = 1, device: str = "cpu"
) -> LatentBackbone:
    """The backbone in a directory that `save_pretrained` or `trainer.save` wrote, with its critic if any.

    Args:
        directory: holds model/, text/ and codec/, and perhaps a critic.
        critic: make a new critic of this configuration instead of loading one.
        num_rewards: heads of the new critic.
        device: where to put the model.

    Raises:
        ValueError: when the directory lacks a part or its model has no adapter.
    """
    path = Path(directory)
    description = path / "model" / "config.json"
    if not description.exists():
        raise ValueError(
            f"{path} holds no model/config.json; pass a directory that trainer.save() or `lacfast demo` wrote"
        )
    name = json.loads(description.read_text(encoding="utf-8")).get("_class_name", "nothing")
    if name not in FAMILIES:
        raise ValueError(f"{path} holds a {name}, which has no backbone; known: {', '.join(FAMILIES)}")
    # diffusers draws weights before it loads them; the caller's random state is none of its business.
    with torch.random.fork_rng(devices=[]):
        model = getattr(diffusers, name).from_pretrained(path / "model")
    text, codec = WordEncoder.from_pretrained(path / "text"), PatchCodec.from_pretrained(path / "codec")
    backbone = _adapt_tiny(model, text, codec, device)
    backbone.critic = (
        read_critic(backbone, path) if critic is None else build_critic(backbone, num_rewards, critic)
    )
    return backbone
