"""The embedded task: 32x32 scenes of coloured shapes, their prompts and the rewards that judge them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lacfast.tasks import checker, gold
from lacfast.tasks.pretraining import Pretrained, pretrain
from lacfast.tasks.prompts import Prompt, all_prompts, split_prompts
from lacfast.tasks.scenes import FloatArray, sample_images
from lacfast.tasks.storage import load_pretrained, save_pretrained

__all__ = [
    "Pretrained",
    "Prompt",
    "all_prompts",
    "ground_truth",
    "held_out_prompts",
    "load_pretrained",
    "pretrain",
    "save_pretrained",
    "shapes_gold",
    "shapes_partial",
    "shapes_reward",
    "shapes_strict",
    "train_prompts",
]


def train_prompts() -> list[Prompt]:
    """The 246 prompts of post-training."""
    return split_prompts()[0]


def held_out_prompts() -> list[Prompt]:
    """The 60 prompts, 15 of every kind, on which post-training is judged."""
    return split_prompts()[1]


def ground_truth(prompts: Sequence[Prompt], *, seed: int = 0) -> Tensor:
    """One rendered scene per prompt, (B, 3, 32, 32) float32 in [0, 1]."""
    return torch.from_numpy(sample_images(prompts, np.random.default_rng(seed)))


def shapes_strict(images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
    """1 where the image shows exactly what the prompt says, else 0; (B,) float32 on the CPU, no gradient."""
    return torch.from_numpy(checker.check(_pixels(images), metadata)[0])


def shapes_partial(images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
    """Share of the prompt that the image shows, (B,) float32 in [0, 1] on the CPU, no gradient."""
    return torch.from_numpy(checker.check(_pixels(images), metadata)[1])


def shapes_reward(images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
    """0.5 strict + 0.5 partial, (B,) float32 in [0, 1] on the CPU, no gradient."""
    strict, partial = checker.check(_pixels(images), metadata)
    return torch.from_numpy(0.5 * strict + 0.5 * partial)


def shapes_gold(images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
    """As `shapes_strict`, by the second checker: never trained on, it tells obedience from an exploit."""
    return torch.from_numpy(gold.check(_pixels(images), metadata)[0])


def _pixels(images: Tensor) -> FloatArray:
    pixels: FloatArray = images.detach().to("cpu", torch.float32).numpy()
    return pixels
