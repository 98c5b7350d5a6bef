"""A task that needs no download: prompts, and pictures that obey them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float32]
SPLIT_SEED = 20260527


@dataclass(frozen=True)
class Prompt:
    """A caption and what a checker needs to judge an image of it."""

    text: str
    metadata: dict[str, Any]
    """`kind` names the form of the prompt; the rest is the task's."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """What the tiny models are pretrained on."""

    name: str
    prompts: Callable[[], list[Prompt]]
    """All of them, those that are held out of post-training too."""
    draw: Callable[[Sequence[Prompt], np.random.Generator], FloatArray]
    """One picture per prompt, (B, 3, H, W) in [0, 1]."""
    background: float
    """Grey of an empty patch."""
    held_out_per_kind: int
    """Prompts of every kind on which post-training is judged."""
    pretraining_share: float = 1.0
    """Of the recipe's optimizer steps: an easy task needs fewer to leave something to mend."""

    def split(self) -> tuple[list[Prompt], list[Prompt]]:
        """The fixed split: prompts to train on, and those held out of post-training."""
        random = np.random.default_rng(SPLIT_SEED)
        members: dict[str, list[Prompt]] = {}
        for prompt in self.prompts():
            members.setdefault(prompt.metadata["kind"], []).append(prompt)
        train: list[Prompt] = []
        held_out: list[Prompt] = []
        for prompts in members.values():
            chosen = set(random.permutation(len(prompts))[: self.held_out_per_kind].tolist())
            train += [prompt for index, prompt in enumerate(prompts) if index not in chosen]
            held_out += [prompt for index, prompt in enumerate(prompts) if index in chosen]
        return train, held_out
