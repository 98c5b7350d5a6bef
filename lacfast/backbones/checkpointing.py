"""Gradient checkpointing: a block runs again in the backward pass, with its forward's casts and dtype."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lacfast.backbones import lora as adapters


def checkpoint_blocks(model: Any, running: Callable[[Tensor], AbstractContextManager[Any]] | None) -> None:
    """Let diffusers' model checkpoint its blocks in a way that a graph can hold.

    Args:
        model: a diffusers model.
        running: from a tensor to the context that the model runs in on its device. None: it needs none, for
            its weights are frozen.
    """
    weight = next(model.parameters())

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        if weight.is_meta and running is not None:
            # torch takes its own autocast along to where a forward runs again, not the stand-in.
            return nullcontext(), running(weight)
        return nullcontext(), adapters.recomputation(model)

    def again(block: Callable[..., Any], *args: Any) -> Any:
        # A model in eval mode draws nothing, and a graph could not hold a generator's state.
        return checkpoint(block, *args, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)

    model.enable_gradient_checkpointing(again)
