"""Prompt embeddings, each distinct prompt encoded once, so that the text encoders can be freed."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor

from lacfast.backbones.parts import PromptEncoder

ENCODE_BATCH = 8
"""Prompts per call of the encoder, always: a matrix product of another height may round differently, and a
resumed run must get the same embeddings as the one that encoded other prompts beside them."""
DEFAULT_CAPACITY = 4 << 30
"""Bytes; a prompt of SD3 takes 2.7 MB in bfloat16."""

Embeddings = tuple[Tensor, Tensor]
"""Tokens (L, D) and pooled (P,) of one prompt, on the CPU."""


class PromptCache:
    """Embeddings by prompt, in memory of the CPU; the longest unused go first when `capacity` is full."""

    def __init__(self, encoder: PromptEncoder, *, capacity: float = DEFAULT_CAPACITY) -> None:
        self.encoder = encoder
        self.capacity = capacity
        self.entries: OrderedDict[str | None, Embeddings] = OrderedDict()
        self.freed = False

    @torch.no_grad()
    def fetch(self, prompts: Sequence[str]) -> Embeddings:
        """Tokens (B, L, D) and pooled embeddings (B, P).

        Raises:
            ValueError: for a prompt that is not here when the encoders are freed.
        """
        found = {prompt: self.entries[prompt] for prompt in prompts if prompt in self.entries}
        missing = [prompt for prompt in dict.fromkeys(prompts) if prompt not in found]
        if missing and self.freed:
            raise ValueError(
                f"the text encoders are freed and {missing[0]!r} was not encoded before "
                f"({len(missing)} such prompts); pass every prompt to free_text_encoders(prompts)"
            )
        for start in range(0, len(missing), ENCODE_BATCH):
            part = missing[start : start + ENCODE_BATCH]
            padded = part + part[-1:] * (ENCODE_BATCH - len(part))
            tokens, pooled = (embeddings.cpu() for embeddings in self.encoder.encode(padded))
            found |= {prompt: (tokens[row].clone(), pooled[row].clone()) for row, prompt in enumerate(part)}
        for prompt in found:
            self.entries[prompt] = found[prompt]
            self.entries.move_to_end(prompt)
        self._evict()
        return _stack([found[prompt] for prompt in prompts])

    @torch.no_grad()
    def fetch_unconditional(self, count: int) -> Embeddings:
        """Tokens (B, L, D) and pooled embeddings (B, P) of `count` samples without a prompt."""
        if None not in self.entries:
            tokens, pooled = self.encoder.encode_unconditional()
            self.entries[None] = tokens[0].cpu(), pooled[0].cpu()
        return _stack([self.entries[None]] * count)

    def free_encoder(self, prompts: Sequence[str]) -> None:
        """Encode `prompts` and the unconditional one, keep them all, and free the encoder."""
        self.capacity = math.inf
        self.fetch_unconditional(1)
        for start in range(0, len(prompts), ENCODE_BATCH):
            self.fetch(prompts[start : start + ENCODE_BATCH])
        if not self.freed:
            self.encoder.free()
        self.freed = True

    def _evict(self) -> None:
        used = sum(_size(entry) for entry in self.entries.values()) if self.capacity < math.inf else 0
        for prompt in list(self.entries):
            if used <= self.capacity:
                break
            if prompt is not None:
                used -= _size(self.entries.pop(prompt))


def _size(entry: Embeddings) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in entry)


def _stack(entries: list[Embeddings]) -> Embeddings:
    return torch.stack([tokens for tokens, _ in entries]), torch.stack([pooled for _, pooled in entries])
