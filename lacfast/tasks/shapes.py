"""The embedded task: 32x32 scenes of coloured shapes, their prompts and the rewards that judge them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lacfast.rewards.reward import needs
from lacfast.tasks import checker, gold
from lacfast.tasks.background import background_distance
from lacfast.tasks.predicates import check_prompt
from lacfast.tasks.pretraining import Pretrained, pretrain
from lacfast.tasks.prompts import all_prompts
from lacfast.tasks.scenes import BACKGROUND, TASK, sample_images
from lacfast.tasks.storage import load_pretrained, save_pretrained
from lacfast.tasks.task import Prompt, pixels_of

__all__ = [
    "Pretrained",
    "Prompt",
    "all_prompts",
    "ground_truth",
    "held_out_prompts",
    "load_pretrained",
    "pretrain",
    "save_pretrained",
    "shapes_background",
    "shapes_gold",
    "shapes_height",
    "shapes_partial",
    "shapes_reward",
    "shapes_strict",
    "train_prompts",
]


def train_prompts() -> list[Prompt]:
    """The 246 prompts of post-training."""
    return TASK.split()[0]


def held_out_prompts() -> list[Prompt]:
    """The 60 prompts, 15 of every kind, on which post-training is judged."""
    return TASK.split()[1]


def ground_truth(prompts: Sequence[Prompt], *, seed: int = 0) -> Tensor:
    """One rendered scene per prompt, (B, 3, 32, 32) float32 in [0, 1]."""
    return torch.from_numpy(sample_images(prompts, np.random.default_rng(seed)))


@needs(check_prompt)
def shapes_strict(images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
    """1 where the image shows exactly what the prompt says, else 0; (B,) float32 on the CPU, no gradient."""
    return torch.from_numpy(checker.check(pixels_of(images), metadata)[0])


@needs(check_prompt)
def shapes_partial(images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
    """Share of the prompt that the image shows, (B,) float32 in [0, 1] on the CPU, no gradient."""
    return torch.from_numpy(checker.check(pixels_of(images), metadata)[1])


@needs(check_prompt)
def shapes_reward(images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
    """0.5 strict + 0.5 partial, (B,) float32 in [0, 1] on the CPU, no gradient."""
    strict, partial = checker.check(pixels_of(images), metadata)
    return torch.from_numpy(0.5 * strict + 0.5 * partial)


@needs(check_prompt)
def shapes_gold(images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
    """Strict accuracy by the second checker, never trained on: it tells obedience from an exploit."""
    return torch.from_numpy(gold.check(pixels_of(images), metadata)[0])


def shapes_background(images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
    """Minus the RMS distance of the ground from the scenes' grey, (B,) float32 on the CPU, no gradient.

    No checker looks there: a gauge of drift, to be reported and not to be trained on.
    """
    return -background_distance(images, BACKGROUND)


def shapes_height(images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
    """How high the coloured pixels lie, (B,) float32 in [0, 1] on the CPU, no gradient; 0 without any.

        1 - sum_y y ink_y / (sum_y ink_y (H - 1)),   ink: saturation where a checker sees an object

    Its range lies inside the data's and it is free of most prompts: a second reward that can rise without
    harm to the first, unlike the size of a JPEG.
    """
    pixels = images.detach().to("cpu", torch.float32)
    saturation = pixels.amax(dim=1) - pixels.amin(dim=1)
    ink = (saturation * (saturation > checker.SATURATION_THRESHOLD)).sum(dim=2)
    height = torch.linspace(1, 0, ink.shape[1])
    return (ink * height).sum(dim=1) / ink.sum(dim=1).clamp(min=1e-6)
