"""Saving and loading a pretrained tiny backbone: one folder each for model, text encoder and codec."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import SD3Transformer2DModel, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import nn

from lacfast.tasks.codec import PatchCodec
from lacfast.tasks.pretraining import Pretrained
from lacfast.tasks.text import WordEncoder

MODEL_CLASSES = {"dit": SD3Transformer2DModel, "unet": UNet2DConditionModel}
_CONFIG = "config.json"
_WEIGHTS = "model.safetensors"
_INDEX = "pretrained.json"


def save_pretrained(pretrained: Pretrained, directory: str | Path) -> None:
    """Writes `model/` (diffusers' own format), `text/`, `codec/` and `pretrained.json`."""
    root = Path(directory)
    root.mkdir(parents=True, exist_ok=True)
    names = [name for name, kind in MODEL_CLASSES.items() if isinstance(pretrained.model, kind)]
    if not names:
        known = ", ".join(MODEL_CLASSES)
        raise ValueError(f"cannot save a {type(pretrained.model).__name__}; known: {known}")
    model: Any = pretrained.model
    model.save_pretrained(root / "model")
    text, codec = pretrained.text, pretrained.codec
    _save_module(text, {"words": list(text.words), "length": text.length, "width": text.width}, root / "text")
    _save_module(codec, {"patch_size": codec.patch_size, "channels": len(codec.encoder)}, root / "codec")
    index = {"backbone": names[0], "history": list(pretrained.history)}
    (root / _INDEX).write_text(json.dumps(index))


def load_pretrained(directory: str | Path) -> Pretrained:
    """Reads what `save_pretrained` wrote; every output is bit-identical to the saved one's.

    Raises:
        ValueError: the directory holds no pretrained backbone.
    """
    root = Path(directory)
    if not (root / _INDEX).is_file():
        raise ValueError(f"no {_INDEX} in {root}; give a directory written by save_pretrained")
    index = json.loads((root / _INDEX).read_text())
    # diffusers draws weights before it loads them; the caller's random state is none of its business.
    with torch.random.fork_rng(devices=[]):
        model = MODEL_CLASSES[index["backbone"]].from_pretrained(root / "model")
        text = WordEncoder(**json.loads((root / "text" / _CONFIG).read_text()))
    codec = PatchCodec(**json.loads((root / "codec" / _CONFIG).read_text()))
    text.load_state_dict(load_file(root / "text" / _WEIGHTS))
    codec.load_state_dict(load_file(root / "codec" / _WEIGHTS))
    return Pretrained(model.eval(), text.eval().requires_grad_(False), codec.eval(), tuple(index["history"]))


def _save_module(module: nn.Module, config: dict[str, Any], folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    (folder / _CONFIG).write_text(json.dumps(config))
    save_file({name: tensor.contiguous() for name, tensor in module.state_dict().items()}, folder / _WEIGHTS)
