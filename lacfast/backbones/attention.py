"""The attention kernel of a model, chosen once through diffusers for sampling and training alike."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any


def attention_signature(model: Any) -> Hashable:
    """The attention kernels of a model's layers, as a key of captured graphs."""
    return frozenset(
        (type(processor).__name__, str(getattr(processor, "_attention_backend", None)))
        for processor in _processors(model)
    )


def set_attention_backend(model: Any, name: str) -> None:
    """Pin "sdpa" (torch's, the default), "xformers", or a name that diffusers' dispatcher knows ("flash").

    Rollout and update must agree, or the first ratio is not 1; so this is no setting of either.

    Raises:
        ValueError: for a backend that is unknown, not installed, or that this model's layers cannot take.
    """
    native = "native" if name == "sdpa" else name
    processors = _processors(model)
    try:
        if all(hasattr(processor, "_attention_backend") for processor in processors):
            model.set_attention_backend(native)
        # Layers of the older kind have processors that the dispatcher skips without a word.
        elif name == "xformers":
            model.enable_xformers_memory_efficient_attention()
        elif native != "native":
            raise ValueError(f"{type(model).__name__} takes 'sdpa' or 'xformers' only")
        elif not all(type(processor).__name__.endswith("2_0") for processor in processors):
            raise ValueError("the model has other attention processors; load it without them")
    except (ValueError, RuntimeError, ImportError) as error:
        raise ValueError(
            f"attention_backend={name!r} cannot be used here: {error}; leave it out for the model's own"
        ) from error


def _processors(model: Any) -> list[Any]:
    """The processors of all attention layers; some models do not list them."""
    if hasattr(model, "attn_processors"):
        return list(model.attn_processors.values())
    return [module.processor for module in model.modules() if hasattr(module, "processor")]
