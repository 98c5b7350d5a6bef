"""The configurations of published models, in configs/: a dry run counts them without the hub."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from torch import nn

from lacfast.config import PipelineSettings

CONFIGS = Path(__file__).with_name("configs")


@dataclass(frozen=True, kw_only=True)
class PublishedModel:
    """A pipeline as its repository on the hub describes it."""

    title: str
    hub_ids: tuple[str, ...]
    """Repositories whose configurations are these."""
    pipeline: str
    """diffusers' class."""
    arguments: Mapping[str, Any]
    """Its switches beside the parts."""
    parameters: int
    """Weights of the denoising model, as published."""
    resolution: tuple[int, int]
    """(height, width) that it is counted at."""
    num_frames: int | None = None
    """Frames that it is counted at, of a model of videos."""
    prompt: Mapping[str, tuple[int, ...]]
    """Shapes of what the denoising model is told of a prompt, by its forward's names."""
    parts: Mapping[str, Mapping[str, Any]]
    """Component -> its class and its configuration."""

    @property
    def settings(self) -> PipelineSettings:
        """What it is counted with."""
        return PipelineSettings(resolution=self.resolution, num_frames=self.num_frames)

    def build(self, *, device: str | torch.device = "meta", text_encoders: bool = True) -> Any:
        """The pipeline without tokenizers, with torch's initial weights where `device` has any."""
        kind: Any = getattr(diffusers, self.pipeline)
        parts = {
            name: self.part(name, device=device) if text_encoders or not _is_text_encoder(name) else None
            for name in self.parts
        }
        absent = {name: None for name in kind._get_signature_keys(kind)[0] if name not in parts}
        return kind(**absent, **parts, **self.arguments)

    def part(self, name: str, *, device: str | torch.device = "meta") -> Any:
        """One component."""
        class_name, config = self.parts[name]["class"], self.parts[name]["config"]
        if name == "scheduler":
            # Tables of numbers, which are wanted.
            return getattr(diffusers, class_name).from_config(config)
        with torch.device(device):
            if not _is_text_encoder(name):
                return getattr(diffusers, class_name).from_config(config)
            encoder = getattr(transformers, class_name)
            return encoder(encoder.config_class(**config))

    def text_encoders(self) -> list[nn.Module]:
        """The parts that encode prompts, on the meta device."""
        return [self.part(name) for name in self.parts if _is_text_encoder(name)]


def _is_text_encoder(name: str) -> bool:
    return name.startswith("text_encoder")


def published_models() -> dict[str, PublishedModel]:
    """All of them by short name."""
    return {path.stem: _read(path) for path in sorted(CONFIGS.glob("*.json"))}


def published_as(hub_id: str) -> PublishedModel | None:
    """The model that a repository of the hub holds, where it is known here."""
    return next((model for model in published_models().values() if hub_id in model.hub_ids), None)


def _read(path: Path) -> PublishedModel:
    entries = json.loads(path.read_text(encoding="utf-8"))
    height, width = entries["resolution"]
    return PublishedModel(**entries | {"hub_ids": tuple(entries["hub_ids"]), "resolution": (height, width)})
