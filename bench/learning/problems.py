"""What is learnt: a task, a base model, rewards that train and scores that only judge."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.learning.dual_encoder import STEPS, DualEncoder, SimilarityReward, train_dual_encoder
from bench.learning.gauges import frechet_distance, off_palette
from lacfast.backbone import Backbone
from lacfast.backbones import adapt_pretrained
from lacfast.metrics import diversity
from lacfast.records import Evaluation
from lacfast.rewards.jpeg import jpeg_incompressibility
from lacfast.rewards.reward import Reward
from lacfast.runtime.directories import whole_directory
from lacfast.tasks import crowds, glyphs, scenes
from lacfast.tasks.background import background_distance
from lacfast.tasks.models import TINY, BackboneName, ModelSize
from lacfast.tasks.pretraining import PretrainConfig, pretrain
from lacfast.tasks.storage import load_pretrained, save_pretrained
from lacfast.tasks.task import Prompt, Task

BUDGET_QUANTILE = 0.25
"""Share of the task's own pictures that keep the budget of their size as a file."""
BASE_SEED = 0
"""Seed of the base models; those of a claim are those of post-training."""
PROXY_SEED, GOLD_SEED = 0, 1
"""Seeds of the dual encoders."""
TUNING_PROMPTS = 48
"""Training prompts that choose settings; reported scores come from held-out prompts alone."""


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A task and how obedience to it is judged."""

    task: Task
    rewards: dict[str, float]
    """Reward -> weight of what trains, unless an arm has its own."""
    judges: tuple[str, ...]
    """Scores that are reported and never trained on; the first is the headline."""


PROBLEMS = {
    "shapes": Problem(task=scenes.TASK, rewards={"shapes": 1.0}, judges=("shapes_strict", "shapes_gold")),
    "glyphs": Problem(task=glyphs.TASK, rewards={"glyphs": 1.0}, judges=("glyphs_strict", "glyphs_gold")),
    "crowds": Problem(task=crowds.TASK, rewards={"crowds": 1.0}, judges=("crowds_strict", "crowds_gold")),
    "similarity": Problem(
        task=scenes.TASK,
        rewards={"similarity": 1.0},
        judges=("shapes_strict", "shapes_gold", "similarity_gold"),
    ),
    "glyphs-similarity": Problem(
        task=glyphs.TASK,
        rewards={"similarity": 1.0},
        judges=("glyphs_strict", "glyphs_gold", "similarity_gold"),
    ),
    "both": Problem(
        task=scenes.TASK,
        rewards={"similarity": 1.0, "shapes": 1.0},
        judges=("shapes_gold", "similarity_gold", "shapes_strict", "similarity", "shapes"),
    ),
    "jpeg": Problem(
        task=scenes.TASK, rewards={"jpeg_compressibility": 1.0}, judges=("shapes_strict", "shapes_gold")
    ),
    "budget": Problem(
        task=scenes.TASK,
        rewards={"jpeg_budget": 1.0},
        judges=("shapes_strict", "shapes_gold", "jpeg_budget"),
    ),
    "layout": Problem(
        task=scenes.TASK,
        rewards={"shapes": 1.0, "shapes_height": 1.0},
        judges=("shapes_strict", "shapes_gold", "shapes_height"),
    ),
}


@dataclass(frozen=True)
class JpegBudget:
    """A reward that asks for small files, but for none smaller than the budget."""

    kilobytes: float
    name: str = "jpeg_budget"

    @staticmethod
    def of(task: Task) -> JpegBudget:
        """A budget inside the range of the task's own pictures."""
        sizes = jpeg_incompressibility(_pictures(task), [], [])
        return JpegBudget(float(sizes.quantile(BUDGET_QUANTILE)))

    def __call__(self, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
        """Minus the kB (B,) that images (B, 3, H, W) in [0, 1] have too many."""
        return (self.kilobytes - jpeg_incompressibility(images, prompts, metadata)).clamp(max=0)


@dataclass(frozen=True)
class Materials:
    """What runs share and what is made once: base models and encoders in a folder."""

    folder: Path
    size: ModelSize = TINY
    """Size of the base models, but for that of their pictures, which is the task's."""
    recipes: Mapping[BackboneName, PretrainConfig] = field(default_factory=dict)
    """Recipes of their pretraining; a backbone that is not here has its own."""
    device: str = "cpu"
    """Device that they are made and run on."""
    encoder_steps: int = STEPS
    """Optimizer steps of the dual encoders, always on the CPU."""
    _features: dict[str, tuple[DualEncoder, Tensor]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )
    """Task -> what `features` returned."""

    def backbone(self, task: Task, name: BackboneName) -> Backbone:
        """A fresh copy of the base model."""
        target = self.folder / f"{task.name}-{name}"
        if not target.exists():
            with whole_directory(target) as made:
                pretrained = pretrain(
                    name,
                    task,
                    seed=BASE_SEED,
                    size=replace(self.size, image_size=task.image_size),
                    config=self.recipes.get(name),
                    device=self.device,
                )
                save_pretrained(pretrained, made)
        return adapt_pretrained(load_pretrained(target), device=self.device)

    def encoder(self, task: Task, seed: int) -> DualEncoder:
        """A trained dual encoder of the task."""
        target = self.folder / f"{task.name}-encoder-{seed}"
        if not target.exists():
            with whole_directory(target) as made:
                train_dual_encoder(task, seed=seed, steps=self.encoder_steps).save_pretrained(made)
        return DualEncoder.from_pretrained(target)

    def features(self, task: Task) -> tuple[DualEncoder, Tensor]:
        """The encoder of gold scores and its features of a task's pictures, once for all runs."""
        if task.name not in self._features:
            encoder = self.encoder(task, GOLD_SEED)
            self._features[task.name] = encoder, encoder.embed_images(_pictures(task))
        return self._features[task.name]

    def reward(self, name: str, task: Task) -> str | Reward:
        """A registered name as it is, or the reward of the task that bears it."""
        if name == "jpeg_budget":
            return JpegBudget.of(task)
        seeds = {"similarity": PROXY_SEED, "similarity_gold": GOLD_SEED}
        return SimilarityReward(self.encoder(task, seeds[name]), name) if name in seeds else name


@dataclass(frozen=True)
class Prompts:
    """Three disjoint sets: trained on, chosen by, reported on."""

    train: list[Prompt]
    tuning: list[Prompt]
    held_out: list[Prompt]

    @staticmethod
    def of(task: Task) -> Prompts:
        train, held_out = task.split()
        chosen = set(np.random.default_rng(5).permutation(len(train))[:TUNING_PROMPTS].tolist())
        return Prompts(
            [prompt for row, prompt in enumerate(train) if row not in chosen],
            [train[row] for row in sorted(chosen)],
            held_out,
        )


def _pictures(task: Task) -> Tensor:
    """Four of every prompt, (B, 3, H, W) in [0, 1]."""
    return torch.from_numpy(task.draw(task.prompts() * 4, np.random.default_rng(11)))


def gauges(materials: Materials, task: Task) -> Callable[[Evaluation], dict[str, float]]:
    """Evaluation -> gauges of hacking: diversity, features' distance to the data, the ground's distance from
    its colour, pixels off the palette."""
    encoder, data = materials.features(task)

    def measure(evaluation: Evaluation) -> dict[str, float]:
        images: Tensor = evaluation.images.to("cpu", torch.float32)
        found = {
            "diversity": diversity(images, evaluation.prompts),
            "feature_distance": frechet_distance(encoder.embed_images(images), data),
            "background": float(background_distance(images, task.background).mean()),
        }
        if task.prompts in (scenes.TASK.prompts, crowds.TASK.prompts):
            found["off_palette"] = float(off_palette(images).mean())
        return found

    return measure
