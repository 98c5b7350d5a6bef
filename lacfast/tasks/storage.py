"""Saving and loading a pretrained tiny backbone: one folder each for model, text encoder and codec."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import torch

from lacfast.tasks.codec import PatchCodec
from lacfast.tasks.pretraining import Pretrained
from lacfast.tasks.text import WordEncoder


def save_pretrained(pretrained: Pretrained, directory: str | Path) -> None:
    """Writes `model/` (diffusers' own format), `text/` and `codec/`."""
    parts: dict[str, Any] = {"model": pretrained.model, "text": pretrained.text, "codec": pretrained.codec}
    for name, part in parts.items():
        part.save_pretrained(Path(directory) / name)


def saved_class(directory: Path) -> str:
    """Name of the diffusers class of a saved model.

    Raises:
        ValueError: the directory holds no pretrained backbone.
    """
    config = directory / "model" / "config.json"
    if not config.is_file():
        raise ValueError(f"no model/config.json in {directory}; give a directory written by save_pretrained")
    return str(json.loads(config.read_text(encoding="utf-8")).get("_class_name", "nothing"))


def load_pretrained(directory: str | Path) -> Pretrained:
    """Reads what `save_pretrained` wrote; every output is bit-identical to the saved one's.

    Raises:
        ValueError: the directory holds no pretrained backbone.
    """
    root = Path(directory)
    kind: Any = getattr(diffusers, saved_class(root))
    # diffusers draws weights before it loads them; the caller's random state is none of its business.
    with torch.random.fork_rng(devices=[]):
        model = kind.from_pretrained(root / "model")
    text, codec = WordEncoder.from_pretrained(root / "text"), PatchCodec.from_pretrained(root / "codec")
    return Pretrained(model.eval(), text, codec)
