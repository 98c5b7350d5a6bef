"""Saving and loading a pretrained tiny backbone: one folder each for model, text encoder and codec."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import SD3Transformer2DModel, UNet2DConditionModel

from lacfast.tasks.codec import PatchCodec
from lacfast.tasks.pretraining import Pretrained
from lacfast.tasks.text import WordEncoder

MODEL_CLASSES = {"dit": SD3Transformer2DModel, "unet": UNet2DConditionModel}
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
    pretrained.text.save_pretrained(root / "text")
    pretrained.codec.save_pretrained(root / "codec")
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
    text, codec = WordEncoder.from_pretrained(root / "text"), PatchCodec.from_pretrained(root / "codec")
    return Pretrained(model.eval(), text, codec, tuple(index["history"]))
