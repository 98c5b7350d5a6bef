"""The parts of a backbone beside its model: text to embeddings, and latents to images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor


class PromptEncoder(Protocol):
    """Text to embeddings."""

    def encode(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Token embeddings (B, L, D) and a pooled embedding (B, P); P = 0 where the family has none."""

    def encode_unconditional(self) -> tuple[Tensor, Tensor]:
        """The same, with B = 1, of what classifier-free guidance puts in a prompt's place."""

    def identity(self) -> str | None:
        """Digest of all that embeddings depend on besides the text; None: they are not worth a file."""

    def set_aside(self) -> None:
        """Give the device's memory back until `bring_back`; what is encoded meanwhile is on the CPU."""

    def bring_back(self) -> None:
        """Put the weights where they were before `set_aside`."""


class LatentCodec(Protocol):
    """Latents to images."""

    def decode(self, latents: Tensor) -> Tensor:
        """Images (B, 3, H, W) float in [0, 1]."""
