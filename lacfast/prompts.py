"""What to draw: prompts with their metadata, in an order that depends on (seed, iteration) only."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch


class PromptLike(Protocol):
    """A caption and what a reward needs to judge an image of it."""

    @property
    def text(self) -> str: ...
    @property
    def metadata(self) -> dict[str, Any]: ...


@dataclass(frozen=True)
class PromptSet:
    """Prompts and their metadata, index by index."""

    texts: list[str]
    metadata: list[dict[str, Any]]

    @staticmethod
    def create(prompts: PromptSet | Iterable[str | PromptLike]) -> PromptSet:
        """From strings (empty metadata) or objects with `text` and `metadata`.

        Raises:
            ValueError: when there is no prompt.
        """
        if isinstance(prompts, PromptSet):
            return prompts
        entries = [
            (entry, {}) if isinstance(entry, str) else (entry.text, entry.metadata) for entry in prompts
        ]
        if not entries:
            raise ValueError("there is no prompt to train on; pass at least one")
        return PromptSet([text for text, _ in entries], [metadata for _, metadata in entries])

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, rows: Sequence[int]) -> PromptSet:
        return PromptSet([self.texts[row] for row in rows], [self.metadata[row] for row in rows])

    def draw(self, count: int, *, seed: int, iteration: int, repeats: int = 1) -> PromptSet:
        """`count` prompts of an iteration, each `repeats` times in a row; every pass is a new permutation."""
        first = iteration * count
        rows = [self._shuffled_row(position, seed) for position in range(first, first + count)]
        return self.take([row for row in rows for _ in range(repeats)])

    def cycle(self, count: int) -> PromptSet:
        """`count` prompts in order, starting again at the end: the same for every evaluation."""
        return self.take([row % len(self) for row in range(count)])

    def _shuffled_row(self, position: int, seed: int) -> int:
        epoch, offset = divmod(position, len(self))
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        return int(torch.randperm(len(self), generator=generator)[offset])
