"""A task that needs no download: prompts, and pictures that obey them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

FloatArray = npt.NDArray[np.float32]
SPLIT_SEED = 20260527
BASE_SIZE = 32
"""H = W of most tasks' pictures at scale 1; every length in pixels is a multiple of the scale."""


def scale_of(images: FloatArray, base_size: int = BASE_SIZE) -> int:
    """How many times larger than `base_size` images (B, 3, H, W) are.

    Raises:
        ValueError: for images that are not square, or no multiple of it.
    """
    scale = int(images.shape[-1]) // base_size
    if scale < 1 or images.shape[1:] != (3, scale * base_size, scale * base_size):
        raise ValueError(
            f"images of shape {images.shape} are no pictures of this embedded task: give "
            f"(B, 3, {base_size}, {base_size}), or a multiple of that size"
        )
    return scale


def pixels_of(images: Tensor) -> FloatArray:
    """Images as a checker takes them, on the host without a gradient."""
    pixels: FloatArray = images.detach().to("cpu", torch.float32).numpy()
    return pixels


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
    image_size: int
    """H = W of the pictures."""
    held_out_per_kind: int
    """Prompts of every kind on which post-training is judged."""
    pretraining_share: float = 1.0
    """Share of the recipe's optimizer steps to take: an easy task needs fewer to leave something to mend."""

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
