"""A pipeline's fingerprint: by it a saved LoRA knows the weights and noise levels that it was trained on.

Of every tensor a few values are kept, rounded to bfloat16: kilobytes for a model of any size. Where all
values agree up to that rounding, the weights are the same, whichever dtypes they were loaded in. A LoRA that
was fused, or another model of the same architecture, moves values by more.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
import transformers
from torch import Tensor, nn

from lacfast.backbones.scheduler_choice import own_settings

VALUES_PER_TENSOR = 4
RELATIVE = 2**-7
"""A step of bfloat16: values of one weight that came through float16 and through float32 differ by one."""
ABSOLUTE = 1e-7
"""Three times what float16 rounds below its smallest normal number."""


@dataclass(frozen=True)
class Fingerprint:
    """Values of the parts of a pipeline that give images, and its noise levels, before training."""

    parts: Mapping[str, Tensor]
    """Component -> (N,) bfloat16 values on the CPU."""
    scheduler: Mapping[str, Any]
    """Class and settings, as they stand in JSON."""

    @staticmethod
    def of(modules: Mapping[str, nn.Module | None], scheduler: Any) -> Fingerprint:
        """The fingerprint of a pipeline.

        Args:
            modules: components by name; what is missing or has no weights yet is left out.
            scheduler: the sampler's, as family.scheduler made it.
        """
        parts = {name: _values(module) for name, module in modules.items() if _has_weights(module)}
        settings = {"class": type(scheduler).__name__} | own_settings(scheduler)
        return Fingerprint(parts, json.loads(json.dumps(settings, default=_plain)))

    def to_json(self) -> dict[str, Any]:
        """What `from_json` reads: the values' bytes as text."""
        texts = {
            name: base64.b64encode(values.view(torch.uint8).numpy().tobytes()).decode()
            for name, values in self.parts.items()
        }
        return {"parts": texts, "scheduler": dict(self.scheduler)}

    @staticmethod
    def from_json(stored: dict[str, Any]) -> Fingerprint:
        """A fingerprint from a saved directory."""
        parts = {
            name: torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.bfloat16)
            for name, text in stored["parts"].items()
        }
        return Fingerprint(parts, stored["scheduler"])

    def differences(self, saved: Fingerprint, *, ignored: Iterable[str] = ()) -> list[str]:
        """Sentences on what differs, empty for the same pipeline. Only what both have is compared.

        Args:
            saved: the other one.
            ignored: parts that may differ.
        """
        names = [name for name in self.parts if name in saved.parts and name not in set(ignored)]
        found = [
            f"the weights of its {name} are others"
            for name in names
            if not _agree(self.parts[name], saved.parts[name])
        ]
        for name, here in self.scheduler.items():
            there = saved.scheduler.get(name, here)
            if there != here:
                found.append(f"its scheduler's {name} was {there!r} and is {here!r}")
        return found


def encoder_identity(
    pipeline: Any, encoders: Mapping[str, Any], tokenizers: Mapping[str, Any], settings: tuple[Any, ...]
) -> str:
    """Digest of all that a bit of a prompt's embeddings depends on besides its text.

    Every bit of the weights counts here, and so do versions and the kind of device, which round in their own
    way: embeddings from a file are those that would be made now.

    Args:
        pipeline: whose encode_prompt is used.
        encoders: its text encoders.
        tokenizers: beside them; a part may be None.
        settings: of the call.
    """
    versions = (torch.__version__, transformers.__version__, diffusers.__version__)
    kind = type(pipeline)
    flags = {name: value for name, value in pipeline.config.items() if isinstance(value, bool | int | float)}
    told: list[Any] = [_ENCODING, versions, kind.__module__, kind.__qualname__, flags, settings]
    digest = hashlib.blake2b(digest_size=16)
    for name, encoder in encoders.items():
        device = next(encoder.parameters()).device
        told += [name, torch.cuda.get_device_name(device) if device.type == "cuda" else device.type]
        told.append({key: value for key, value in encoder.config.to_dict().items() if key not in _PLACES})
        for path, tensor in encoder.state_dict().items():
            digest.update(f"{name}.{path} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(bytes_of(tensor))
    for name, tokenizer in tokenizers.items():
        told += [name, None if tokenizer is None else _tokenization(tokenizer)]
    digest.update(json.dumps(told, sort_keys=True, default=str).encode())
    return digest.hexdigest()


def bytes_of(tensor: Tensor) -> memoryview:
    """The values of a tensor as they are stored."""
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data


_ENCODING = 2
"""Version of how this package calls a pipeline for embeddings; a change of them raises it."""
_PLACES = ("_name_or_path", "transformers_version")
"""Settings of an encoder that tell where it is from."""


def _tokenization(part: Any) -> list[Any]:
    """What a tokenizer or a processor makes tokens by; padding and truncation are set at every call."""
    tokenizer = getattr(part, "tokenizer", part)
    told = [type(tokenizer).__name__, tokenizer.model_max_length, tokenizer.get_vocab()]
    told.append(getattr(part, "chat_template", None))
    if tokenizer.is_fast:
        state = json.loads(tokenizer.backend_tokenizer.to_str())
        told += [state[name] for name in ("added_tokens", "normalizer", "pre_tokenizer", "model")]
    return told


def _has_weights(module: nn.Module | None) -> bool:
    first = None if module is None else next(module.parameters(), None)
    return first is not None and not first.is_meta


@torch.no_grad()
def _values(module: Any) -> Tensor:
    taken = []
    for _, parameter in sorted(module.named_parameters()):
        size = parameter.numel()
        count = min(VALUES_PER_TENSOR, size)
        places = [(2 * index + 1) * size // (2 * count) for index in range(count)]
        taken.append(parameter.take(torch.tensor(places, device=parameter.device)).float())
    return torch.cat(taken).bfloat16().cpu()


def _agree(here: Tensor, there: Tensor) -> bool:
    if here.shape != there.shape:
        return False
    ours, theirs = here.float(), there.float()
    allowed = RELATIVE * torch.maximum(ours.abs(), theirs.abs()) + ABSOLUTE
    return bool(((ours - theirs).abs() <= allowed).all())


def _plain(value: Any) -> Any:
    """A setting's array as a list: betas of one's own."""
    return value.tolist()
