"""How a backbone lies on disk: a diffusers pipeline or LoRA, or the parts of a tiny model."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY, LORA_WEIGHT_NAME_SAFE
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from lacfast.backbones import lora as adapters
from lacfast.backbones.fingerprint import Fingerprint
from lacfast.backbones.int8 import is_quantized
from lacfast.backbones.latent import LatentBackbone
from lacfast.backbones.model_card import Saved, model_card
from lacfast.backbones.pipelines import PipelineFamily
from lacfast.backbones.trained_lora import PEFT_PREFIX
from lacfast.checkpoint import MODEL_CARD
from lacfast.config import LoRAConfig, PipelineSettings, from_json, to_json
from lacfast.distributed.sharding import divided, own_class

DESCRIPTION = "lacfast.json"
"""What load_backbone needs beside diffusers' own files."""
EXACT_WEIGHTS = "lora_before_scaling.safetensors"
"""A LoRA's weights as they are trained, where those that loaders scale by 1 had to be rounded."""


class PartsStorage:
    """model/, text/ and codec/, and the LoRA beside them: self-contained and small."""

    def weights(self, backbone: LatentBackbone) -> dict[str, Tensor]:
        adapter = {} if backbone.lora is None else backbone.policy_state()
        return adapters.plain_state(backbone.model) | adapter

    def write(self, backbone: LatentBackbone, directory: Path, weights: dict[str, Tensor]) -> None:
        names = () if backbone.lora is None else backbone.policy_state().keys()
        adapter = {name: weights[name] for name in names}
        parts: dict[str, Any] = {
            "model": _plain_model(backbone, {name: weights[name] for name in weights if name not in names}),
            "text": backbone.prompt_encoder,
            "codec": backbone.codec,
        }
        for name, part in parts.items():
            part.save_pretrained(directory / name)
        if backbone.lora is not None:
            save_file(_contiguous(adapter), directory / LORA_WEIGHT_NAME_SAFE)
            write_description(directory, lora=to_json(backbone.lora))

    def read(self, backbone: LatentBackbone, directory: Path) -> dict[str, Tensor]:
        _require_same_lora(backbone, directory)
        if backbone.lora is not None:
            return load_file(directory / LORA_WEIGHT_NAME_SAFE)
        return _model_state(backbone.model, directory / "model")


class PipelineStorage:
    """What plain diffusers loads: `load_lora_weights` for LoRA, `from_pretrained` for all weights. Where the
    pipeline has no `load_lora_weights`, a LoRA is what `PeftModel.from_pretrained` loads.

    With LoRA only its weights are written. Without, the whole pipeline is; when its encoders are set aside,
    the trained model alone, and the rest comes from `base` again.
    """

    def __init__(
        self,
        pipeline: Any,
        family: PipelineFamily,
        settings: PipelineSettings,
        base: str | None,
        fingerprint: Fingerprint,
        merged_loras: Mapping[str, float],
        in_peft_layout: Collection[str],
    ) -> None:
        """
        Args:
            pipeline: whose model is trained.
            family: its class's.
            settings: it is used with.
            base: directory or hub id of the untrained pipeline, None when it has none.
            fingerprint: of the untrained pipeline.
            merged_loras: LoRAs in its weights, with theirs, that `base` is without.
            in_peft_layout: those among them that peft loads.
        """
        self.pipeline = pipeline
        self.family = family
        self.settings = settings
        self.base = base
        self.fingerprint = fingerprint
        self.merged_loras = {_anywhere(source): weight for source, weight in merged_loras.items()}
        self.in_peft_layout = [_anywhere(source) for source in in_peft_layout]

    def weights(self, backbone: LatentBackbone) -> dict[str, Tensor]:
        return backbone.policy_state()

    def write(self, backbone: LatentBackbone, directory: Path, weights: dict[str, Tensor]) -> None:
        part = self.family.model_part
        if backbone.lora is not None:
            kind = self._write_lora(weights, backbone, directory)
        elif backbone.prompts.is_aside:
            kind = "part"
            _plain_model(backbone, weights).save_pretrained(directory / part)
        else:
            kind = "pipeline"
            self._write_pipeline(_plain_model(backbone, weights), directory)
        write_description(
            directory,
            pipeline=type(self.pipeline).__name__,
            base=self.base,
            merged_loras=self.merged_loras,
            settings=to_json(self.settings),
            lora=None if backbone.lora is None else to_json(backbone.lora),
            dtype=str(backbone.dtype).removeprefix("torch."),
            base_precision="int8" if is_quantized(backbone.model) else "model",
            fingerprint=self.fingerprint.to_json(),
        )
        saved = Saved(
            pipeline=type(self.pipeline).__name__,
            task="text-to-image" if self.family.num_frames is None else "text-to-video",
            base=self.base,
            part=part,
            model=own_class(backbone.model).__name__,
            kind=kind,
            merged_loras=self.merged_loras,
            in_peft_layout=self.in_peft_layout,
        )
        (directory / MODEL_CARD).write_text(model_card(saved), encoding="utf-8")

    def _write_lora(self, weights: dict[str, Tensor], backbone: LatentBackbone, directory: Path) -> str:
        """Returns the kind of what was written, see Saved."""
        part, config = self.family.model_part, backbone.model.peft_config[adapters.POLICY]
        if hasattr(self.pipeline, "save_lora_weights"):
            state, metadata = _scaled_by_weights(weights, config.to_dict())
            if not _is_exact(config.lora_alpha / config.r):
                save_file(_contiguous(weights), directory / EXACT_WEIGHTS)
            arguments = {
                f"{part}_lora_layers": _contiguous(state), f"{part}_lora_adapter_metadata": metadata
            }  # fmt: skip
            self.pipeline.save_lora_weights(directory, **arguments)
            return "lora"
        # A pipeline that loads no LoRA itself: its model does, through peft, which reads alpha in the config.
        config.save_pretrained(directory)
        state = {f"{PEFT_PREFIX}{name}": tensor for name, tensor in weights.items()}
        save_file(_contiguous(state), directory / SAFETENSORS_WEIGHTS_NAME)
        return "peft"

    def _write_pipeline(self, plain_model: Any, directory: Path) -> None:
        part = self.family.model_part
        own = getattr(self.pipeline, part)
        try:
            setattr(self.pipeline, part, plain_model)
            self.pipeline.save_pretrained(directory)
        finally:
            setattr(self.pipeline, part, own)

    def read(self, backbone: LatentBackbone, directory: Path) -> dict[str, Tensor]:
        part = self.family.model_part
        _require_same_lora(backbone, directory)
        # The model itself is there when all its weights were trained.
        self._require_same_base(directory, trained=() if backbone.lora is not None else (part,))
        if backbone.lora is not None:
            if not hasattr(self.pipeline, "save_lora_weights"):
                saved = load_file(directory / SAFETENSORS_WEIGHTS_NAME)
                return {name.removeprefix(PEFT_PREFIX): tensor for name, tensor in saved.items()}
            if (directory / EXACT_WEIGHTS).exists():
                return load_file(directory / EXACT_WEIGHTS)
            file = directory / LORA_WEIGHT_NAME_SAFE
            state = {name.removeprefix(f"{part}."): tensor for name, tensor in load_file(file).items()}
            own = adapters.scale_of(backbone.lora)
            return _scaled_by(state, _saved_scale(file, part, own) / own)
        return _model_state(backbone.model, directory / part)

    def _require_same_base(self, directory: Path, *, trained: tuple[str, ...]) -> None:
        stored = read_description(directory).get("fingerprint")
        if stored is None:
            warnings.warn(
                f"{directory} is of an earlier version and does not tell which weights it was trained on: "
                "make sure that they are this pipeline's; saving it again writes them down",
                stacklevel=2,
            )
            return
        differences = self.fingerprint.differences(Fingerprint.from_json(stored), ignored=trained)
        if differences:
            raise ValueError(
                f"{directory} was trained on another pipeline than this one: {'; '.join(differences)}. "
                "Pass the pipeline that it was trained on, say load_backbone(..., base=pipeline); one that "
                "was changed in memory (a fused LoRA, another scheduler or VAE) is kept by "
                "pipeline.save_pretrained()"
            )


def _plain_model(backbone: LatentBackbone, weights: dict[str, Tensor]) -> Any:
    """The model as diffusers knows it, without adapters, on `weights`: its own, none of them sharded."""
    model = backbone.model
    if not adapters.tuner_layers(model) and not divided([model]):
        return model
    with torch.device("meta"):
        plain = own_class(model).from_config(model.config)
    plain.load_state_dict(weights, assign=True)
    return plain


def _require_same_lora(backbone: LatentBackbone, directory: Path) -> None:
    """
    Raises:
        ValueError: when what was trained in `directory` is another LoRA, or all weights instead of one.
    """
    saved, own = saved_lora(read_description(directory)), backbone.lora
    # The seed of the first weights says nothing of the trained ones.
    if saved != (own if saved is None or own is None else replace(own, seed=saved.seed)):
        raise ValueError(
            f"{directory} was trained with lora={saved}, and this model has lora={own}; use the same, or "
            "start another run from the weights"
        )


def _model_state(model: Any, directory: Path) -> dict[str, Tensor]:
    # diffusers draws weights before it loads them; the caller's random state is none of its business.
    with torch.random.fork_rng(devices=[]):
        state: dict[str, Tensor] = own_class(model).from_pretrained(directory).state_dict()
    return state


def _scaled_by_weights(
    state: dict[str, Tensor], metadata: dict[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A LoRA with alpha / rank inside its weights, and the settings that say so.

    diffusers reads alpha in the file's metadata, ComfyUI and sd-scripts in keys beside the weights, and most
    of diffusers' loaders refuse a file with such keys. Without alpha all of them scale by 1. A scale that is
    no power of two rounds the weights, and a run that goes on would have others: it reads EXACT_WEIGHTS.
    """
    scale = metadata["lora_alpha"] / metadata["r"]
    return _scaled_by(state, scale), metadata | {"lora_alpha": metadata["r"]}


def _is_exact(scale: float) -> bool:
    """Whether float32 weights times `scale`, and back, are the same."""
    return math.frexp(scale)[0] == 0.5


def _scaled_by(state: dict[str, Tensor], factor: float) -> dict[str, Tensor]:
    return {
        name: tensor * factor if factor != 1 and ".lora_B." in name else tensor
        for name, tensor in state.items()
    }


def _saved_scale(file: Path, part: str, unsaid: float) -> float:
    """alpha / rank of a LoRA's file, `unsaid` where it does not tell."""
    with safe_open(file, framework="pt") as opened:
        told = (opened.metadata() or {}).get(LORA_ADAPTER_METADATA_KEY)
    metadata: dict[str, Any] = {} if told is None else json.loads(told)
    scale: float = metadata[f"{part}.lora_alpha"] / metadata[f"{part}.r"] if metadata else unsaid
    return scale


def _anywhere(source: str) -> str:
    """A path as it is valid from any directory; a hub id stays."""
    return str(Path(source).absolute()) if Path(source).exists() else str(source)


def _contiguous(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.contiguous() for name, tensor in state.items()}


def write_description(directory: Path, **entries: Any) -> None:
    (directory / DESCRIPTION).write_text(json.dumps(entries, indent=2) + "\n", encoding="utf-8")


def read_description(directory: Path) -> dict[str, Any]:
    """Empty when the directory has none."""
    path = directory / DESCRIPTION
    if not path.exists():
        return {}
    entries: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return entries


def saved_lora(description: dict[str, Any]) -> LoRAConfig | None:
    return None if description.get("lora") is None else from_json(LoRAConfig, description["lora"])
