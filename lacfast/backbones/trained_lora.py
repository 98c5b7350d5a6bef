"""LoRAs that were trained elsewhere: read by diffusers' loader or peft's, to be trained on or merged.

They are read onto copies of a pipeline's modules that have no weights, so that the pipeline is not touched
and nothing is rounded to the dtype of its base.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from logging import Handler, LogRecord
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.peft import PeftAdapterMixin
from diffusers.utils import logging
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file
from torch import Tensor, nn

from lacfast.backbones import lora as adapters
from lacfast.config import LoRAConfig
from lacfast.runtime.directories import recover, require_whole

LoRASource = str | os.PathLike[str]
"""A directory, a file, a hub id, or a file of a repository: "owner/name/file.safetensors"."""

_PEFT_CONFIG = "adapter_config.json"
"""File of the settings beside peft's weights."""
PEFT_PREFIX = "base_model.model."
"""What the names in peft's weights begin with."""


@dataclass(frozen=True)
class TrainedLoRA:
    """A LoRA that was trained elsewhere, on modules that have it."""

    source: str
    parts: Mapping[str, Any]
    """Component of the pipeline that it adapts -> a module like it, on the CPU, with the adapter and no other
    weights; of a LoRA that is on the pipeline the component itself."""
    is_in_peft_layout: bool = False
    """Whether it is peft's loader that reads it."""
    adapter: str = adapters.POLICY
    """Its name in the parts."""
    merging: str = ""
    """How it is merged into the weights. Empty: by its source."""

    def config(self, part: str) -> LoRAConfig:
        """The adapter as it is trained on.

        Args:
            part: component that is trained.

        Raises:
            ValueError: for what is not trained here: text encoders, or ranks and scales that differ.
        """
        others = sorted(set(self.parts) - {part})
        if others:
            raise self._refusal(f"adapts {', '.join(others)}, and only the {part} is trained")
        layers = adapters.tuner_layers(self.parts[part])
        ranks = {layer.r[self.adapter] for layer in layers.values()}
        scales = {layer.scaling[self.adapter] for layer in layers.values()}
        if len(ranks) > 1 or len(scales) > 1:
            raise self._refusal(
                f"has ranks {sorted(ranks)} and scales {sorted(scales)}; one of each is trained"
            )
        (rank,), (scale,) = ranks, scales
        return LoRAConfig(
            rank=rank, alpha=None if scale == 1 else rank * scale, target_modules=_ends(self.parts[part])
        )

    def state(self, part: str) -> dict[str, Tensor]:
        """The weights of a component, named as in `lora.adapter_state`."""
        return adapters.adapter_state(self.parts[part], self.adapter)

    @torch.no_grad()
    def merge_into(self, pipeline: Any, weight: float) -> None:
        """Add `weight` times the LoRA's change to the pipeline's weights; the sum is rounded once."""
        for component, adapted in self.parts.items():
            module: nn.Module = getattr(pipeline, component)
            for name, layer in adapters.tuner_layers(adapted).items():
                base: Any = module.get_submodule(name).weight
                change = layer.float().get_delta_weight(self.adapter).to(base.device)
                base.copy_(base.float() + weight * change)

    def _refusal(self, fault: str) -> ValueError:
        merging = self.merging or (
            f"merged_loras={{{self.source!r}: 1.0}}, or --merged-loras {self.source} 1.0"
        )
        return ValueError(
            f"the LoRA {self.source} {fault}. Merge it into the weights and train a new one on them: "
            f"{merging}"
        )


def read_lora(source: LoRASource, pipeline: Any, model_part: str, text_parts: tuple[str, ...]) -> TrainedLoRA:
    """A LoRA in diffusers' layout (or one that its loader knows, as kohya's) or in peft's.

    Args:
        source: see LoRASource; a directory that lacfast saved is one too.
        pipeline: that it belongs to.
        model_part: its component that is trained; a LoRA in peft's layout is of this one.
        text_parts: its components that encode prompts.

    Raises:
        ValueError: when there is none, when it does not fit, or when it is more than a plain LoRA.
    """
    place, file = _place(source)
    hollow = _without_weights(pipeline, (model_part, *text_parts))
    model = getattr(hollow, model_part)
    shapes = _shapes(model)
    try:
        with _heard() as left_out:
            peft = _peft_directory(place, file)
            if peft is not None:
                _load_peft(model, peft)
            else:
                # Of safetensors alone: what else a file may be could run code.
                hollow.load_lora_weights(
                    place,
                    weight_name=file,
                    adapter_name=adapters.POLICY,
                    use_safetensors=True,
                    low_cpu_mem_usage=True,
                )
    except (OSError, ValueError, KeyError, RuntimeError, TypeError, IndexError) as error:
        raise ValueError(
            f"{source} is no LoRA of a {type(pipeline).__name__}: {error}; pass a directory or file in "
            "diffusers' or peft's layout, a hub id, or one file of a repository as owner/name/FILE"
        ) from error
    if left_out:
        raise ValueError(
            f"{source} would not be loaded as it is. diffusers says: {left_out[0][:200]}. Pass a plain "
            f"LoRA of this {type(pipeline).__name__}, and of a directory with several the file"
        )
    parts = {name: getattr(hollow, name) for name in (model_part, *text_parts)}
    adapted = {name: part for name, part in parts.items() if _is_adapted(part)}
    trained = TrainedLoRA(str(source), adapted, is_in_peft_layout=peft is not None)
    if not trained.parts:
        raise ValueError(
            f"{source} adapts no part of the {type(pipeline).__name__}; pass a LoRA of this model"
        )
    if getattr(model, "_transformer_norm_layers", None) or not shapes.items() <= _shapes(model).items():
        raise ValueError(f"{source} changes more than a LoRA does: norms or shapes; pass a plain LoRA")
    _require_plain(trained)
    return trained


def loaded_lora(pipeline: Any, model_part: str, text_parts: tuple[str, ...]) -> TrainedLoRA | None:
    """The LoRA that is on a pipeline already, with its live weights; None where there is none.

    Args:
        pipeline, model_part, text_parts: see `read_lora`.

    Raises:
        ValueError: for several, or for more than a plain LoRA.
    """
    parts = {name: getattr(pipeline, name) for name in (model_part, *text_parts)}
    parts = {name: part for name, part in parts.items() if _is_adapted(part)}
    names = sorted({name for part in parts.values() for name in part.peft_config})
    if not names:
        return None
    merging = "pipeline.fuse_lora(), pipeline.unload_lora_weights()"
    if len(names) > 1:
        raise ValueError(f"the pipeline has the LoRAs {names}, and one is trained; merge them: {merging}")
    trained = TrainedLoRA("of the pipeline", parts, adapter=names[0], merging=merging)
    _require_plain(trained)
    return trained


def _require_plain(trained: TrainedLoRA) -> None:
    """
    Raises:
        ValueError: for a kind of LoRA whose change is no s B A.
    """
    for adapted in trained.parts.values():
        _require_plain_config(adapted.peft_config[trained.adapter], trained.source)


def _require_plain_config(config: Any, source: str) -> None:
    if not isinstance(config, LoraConfig) or config.use_dora or config.lora_bias or config.bias != "none":
        raise ValueError(
            f"the LoRA {source} is no plain one but a LoKr, a DoRA or one with biases; let diffusers merge "
            "it: pipeline.load_lora_weights(), pipeline.fuse_lora(), pipeline.save_pretrained()"
        )


def _place(source: LoRASource) -> tuple[str, str | None]:
    """Directory or repository, and the file in it where one is named."""
    path = Path(source)
    if not path.exists():
        recover(path)
    if path.is_file():
        return str(path.parent), path.name
    if path.is_dir():
        require_whole(path)
        return str(path), None
    owner, _, rest = str(source).partition("/")
    name, _, file = rest.partition("/")
    return f"{owner}/{name}" if name else owner, file or None


def _peft_directory(place: str, file: str | None) -> Path | None:
    """The directory of a LoRA in peft's layout, from the hub where it is there."""
    if Path(place).is_dir():
        has_config = (Path(place) / _PEFT_CONFIG).exists()
        return Path(place) if has_config and file in (None, SAFETENSORS_WEIGHTS_NAME) else None
    if file is not None:
        return None
    try:
        config = hf_hub_download(place, _PEFT_CONFIG)
        hf_hub_download(place, SAFETENSORS_WEIGHTS_NAME)
    except EntryNotFoundError:
        return None
    return Path(config).parent


def _load_peft(model: Any, directory: Path) -> None:
    config = LoraConfig.from_pretrained(str(directory))
    saved = load_file(directory / SAFETENSORS_WEIGHTS_NAME)
    state = {name.removeprefix(PEFT_PREFIX): tensor for name, tensor in saved.items()}
    if isinstance(model, PeftAdapterMixin):
        model.load_lora_adapter(
            state,
            prefix=None,
            metadata=config.to_dict(),
            adapter_name=adapters.POLICY,
            low_cpu_mem_usage=True,
        )
        return
    inject_adapter_in_model(config, model, adapter_name=adapters.POLICY)
    left: Any = set_peft_model_state_dict(model, state, adapter_name=adapters.POLICY)
    missing = [name for name in left.missing_keys if adapters.adapter_of(name)]
    if missing or left.unexpected_keys:
        raise KeyError(f"its weights do not fit: {[*missing, *left.unexpected_keys][:2]}")


def _without_weights(pipeline: Any, parts: tuple[str, ...]) -> Any:
    """The pipeline with other modules in the place of some parts: of the same shapes, without weights."""
    hollow = copy.copy(pipeline)
    for name in parts:
        part = getattr(pipeline, name)
        if part is not None:
            setattr(hollow, name, _hollow(part))
    return hollow


def _hollow(part: Any) -> Any:
    """A module like `part` in float32 on the CPU, of which every tensor is one number, repeated."""
    kind: Any = type(part)
    with torch.device("meta"):
        # transformers' modules are made of their config, diffusers' by it.
        made = kind.from_config(part.config) if hasattr(kind, "load_config") else kind(part.config)
    for module in made.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    repeated = torch.zeros((), dtype=tensor.dtype).expand(tensor.shape)
                    is_weight = tensors is module._parameters
                    tensors[name] = nn.Parameter(repeated, requires_grad=False) if is_weight else repeated
    return made


def _ends(adapted: nn.Module) -> tuple[str, ...]:
    """The shortest ends of names that tell the adapted modules from all others."""
    layers = adapters.tuner_layers(adapted).keys()
    names = {name.removesuffix(".base_layer") for name, _ in adapted.named_modules()}
    depth, found, ends = 0, set[str](), set[str]()
    while found != layers and depth <= max(name.count(".") for name in layers):
        depth += 1
        ends = {".".join(name.split(".")[-depth:]) for name in layers}
        found = {name for name in names if adapters.is_target(name, ends)}
    return tuple(sorted(ends))


def _shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {
        name.replace(".base_layer.", "."): parameter.shape
        for name, parameter in model.named_parameters()
        if adapters.adapter_of(name) is None
    }


def _is_adapted(part: nn.Module | None) -> bool:
    return part is not None and bool(adapters.tuner_layers(part))


class _Lines(Handler):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: LogRecord) -> None:
        # A LoRA of the model alone is none of the text encoders, which is no fault.
        if not record.getMessage().startswith("No LoRA keys associated"):
            self.lines.append(record.getMessage())


@contextmanager
def _heard() -> Iterator[list[str]]:
    """What diffusers warns of meanwhile, as it does of weights that it leaves out; it is not shown."""
    level, heard = logging.get_verbosity(), _Lines()
    logging.set_verbosity_warning()
    logging.disable_default_handler()
    logging.add_handler(heard)
    try:
        yield heard.lines
    finally:
        logging.remove_handler(heard)
        logging.enable_default_handler()
        logging.set_verbosity(level)
