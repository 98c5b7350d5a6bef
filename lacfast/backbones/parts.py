"""The parts of a backbone beside its model: text to embeddings, and latents to images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

Embeddings = dict[str, Tensor]
"""What a model is told of prompts: tensors (B, ...) by the name that its family reads them by."""


def stacked(prompts: Sequence[Embeddings]) -> Embeddings:
    """(B, ...) of B prompts' (...)."""
    return {name: torch.stack([prompt[name] for prompt in prompts]) for name in prompts[0]}


def empty_embeddings(
    shapes: Mapping[str, tuple[int, ...]],
    count: int,
    *,
    device: str | torch.device,
    dtype: torch.dtype = torch.float32,
) -> Embeddings:
    """(B, ...) of `count` prompts, without values; a mask says that all tokens are theirs."""
    return {
        name: torch.ones((count, *shape), device=device, dtype=torch.bool)
        if name.endswith("mask")
        else torch.empty((count, *shape), device=device, dtype=dtype)
        for name, shape in shapes.items()
    }


class PromptEncoder(Protocol):
    """Text to embeddings."""

    def encode(self, prompts: Sequence[str]) -> Embeddings:
        """(B, ...) each, of one length L whatever the prompts are."""

    def encode_unconditional(self) -> Embeddings:
        """Embeddings, B = 1, of what classifier-free guidance puts in a prompt's place."""

    def identity(self) -> str | None:
        """Digest of all that embeddings depend on besides the text; None: they are not worth a file."""

    def set_aside(self) -> None:
        """Give the device's memory back until `bring_back`; what is encoded meanwhile is on the CPU."""

    def bring_back(self) -> None:
        """Put the weights where they were before `set_aside`."""


class LatentCodec(Protocol):
    """Latents to images."""

    def decode(self, latents: Tensor) -> Tensor:
        """Images (B, 3, H, W), or videos (B, F, 3, H, W), float in [0, 1]."""
