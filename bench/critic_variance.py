"""Explained variance by step of every critic between the prompts' floor and the states' ceiling.

Called by bench.critic_trunks with --measures. One cell is one critic on one seed: value pretraining with the
actor frozen, then the score of its held-out explained variance, for "iterations" with PPO after it.
Cells are written as they finish and skipped when they are there, so a run that stopped goes on.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lacfast import CriticConfig, presets
from lacfast.backbones import adapt_pretrained
from lacfast.config import TrainConfig
from lacfast.explained_variance import ValueBounds
from lacfast.tasks.shapes import held_out_prompts, train_prompts
from lacfast.tasks.storage import load_pretrained
from lacfast.trainer import SELECTION_IDS, LatentActorCriticTrainer
from lacfast.value_pretraining import held_out_variance

MEASURES = ("trunks", "iterations", "time", "text", "loss")
TRUNKS = ("branch", "shared", "lora", "copy", "latent_net", "prompt_only", "pixel")
ITERATIONS = (0, 5, 15, 40)


@dataclass(frozen=True)
class Scale:
    """How much is sampled; part of the result, cells of another scale are not taken over."""

    batch_size: int
    """Trajectories per rollout."""
    iterations: int
    """Of value pretraining, but for the measure "iterations"."""
    held_out_samples: int
    completions: int
    bound_states: int
    train_iterations: int
    """Of PPO after value pretraining, for the measure "iterations"."""
    eval_samples: int


@dataclass(frozen=True)
class Cell:
    """One critic on one seed."""

    measure: str
    name: str
    seed: int
    critic: CriticConfig
    iterations: int

    @property
    def key(self) -> str:
        return f"{self.measure}/{self.name}/{self.seed}"


def cells(
    measures: Sequence[str], seeds: Sequence[int], preset: CriticConfig, scale: Scale
) -> Iterator[Cell]:
    """Every critic of every measure, seed by seed, so that an early stop leaves whole comparisons."""
    variants: dict[str, dict[str, dict[str, Any]]] = {
        "trunks": {trunk: {"trunk": trunk} for trunk in TRUNKS},
        "time": {"on": {}, "off": {"time_conditioning": False}},
        "text": {name: {"text_conditioning": name} for name in ("none", "pooled", "tokens")},
        "loss": {name: {"loss": name} for name in ("mse", "bce", "hl_gauss")},
    }
    for seed in seeds:
        for measure in measures:
            if measure == "iterations":
                for count in ITERATIONS:
                    yield Cell(measure, str(count), seed, preset, count)
                continue
            for name, changes in variants[measure].items():
                yield Cell(measure, name, seed, replace(preset, **changes), scale.iterations)


def run(
    pretrained: Path, backbone: str, measures: Sequence[str], seeds: Sequence[int], scale: Scale, result: Path
) -> dict[str, Any]:
    """Measure what `result` does not hold yet, write it after every cell, print a table at the end.

    Raises:
        ValueError: when `result` holds cells of another backbone or scale.
    """
    preset = presets.shapes(backbone)
    settings = {"backbone": backbone, "scale": asdict(scale), "torch": torch.__version__}
    stored: dict[str, Any] = {"settings": settings, "bounds": {}, "cells": {}}
    if result.exists():
        stored = json.loads(result.read_text(encoding="utf-8"))
        if stored["settings"] != settings:
            raise ValueError(
                f"{result} was measured with {stored['settings']}, not {settings}; name another file"
            )
    for seed in seeds:
        if str(seed) not in stored["bounds"]:
            stored["bounds"][str(seed)] = _bounds(_trainer(pretrained, preset, scale, preset.critic, seed, 1))
            _write(result, stored)
    for cell in cells(measures, seeds, preset.critic, scale):
        if cell.key in stored["cells"]:
            continue
        trainer = _trainer(pretrained, preset, scale, cell.critic, cell.seed, cell.iterations)
        bounds = ValueBounds(
            torch.tensor(stored["bounds"][str(cell.seed)]["floor"]),
            torch.tensor(stored["bounds"][str(cell.seed)]["ceiling"]),
            (),
            0,
        )
        stored["cells"][cell.key] = _measure(trainer, cell, bounds, scale)
        _write(result, stored)
        print(cell.key, stored["cells"][cell.key], flush=True)
    print("\n".join(table(stored)))
    return stored


def _write(result: Path, stored: dict[str, Any]) -> None:
    """Whole or not at all."""
    result.parent.mkdir(parents=True, exist_ok=True)
    temporary = result.with_suffix(".partial")
    temporary.write_text(json.dumps(stored, indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, result)


def _trainer(
    pretrained: Path, preset: TrainConfig, scale: Scale, critic: CriticConfig, seed: int, iterations: int
) -> LatentActorCriticTrainer:
    # A rare 1 must not be cut out of a probability's targets.
    ppo = replace(preset.ppo, target_clip=math.inf) if critic.loss == "bce" else preset.ppo
    config = replace(
        preset,
        seed=seed,
        batch_size=scale.batch_size,
        critic=critic,
        ppo=ppo,
        eval_samples=scale.eval_samples,
        pretrain=replace(
            preset.pretrain,
            iterations=max(iterations, 1),
            patience=max(iterations, 1),
            held_out_samples=scale.held_out_samples,
            completions=scale.completions,
            bound_states=scale.bound_states,
        ),
    )
    return LatentActorCriticTrainer(
        adapt_pretrained(load_pretrained(pretrained)),
        "shapes",
        train_prompts(),
        config,
        held_out=held_out_prompts(),
        evaluation_rewards=["shapes_strict"],
    )


def _bounds(trainer: LatentActorCriticTrainer) -> dict[str, Any]:
    """Floor and ceiling of the frozen actor; the same for every critic of a seed."""
    rollout = trainer.collect(trainer.held_out.cycle(trainer.config.pretrain.held_out_samples), SELECTION_IDS)
    assert rollout is not None
    bounds = trainer.measure_bounds(rollout)
    return {"floor": bounds.floor.tolist(), "ceiling": bounds.ceiling.tolist(), "images": bounds.images}


def _measure(
    trainer: LatentActorCriticTrainer, cell: Cell, bounds: ValueBounds, scale: Scale
) -> dict[str, Any]:
    # The bounds are measured once for all critics of a seed.
    config = replace(trainer.config, pretrain=replace(trainer.config.pretrain, completions=0))
    trainer.config = config
    assert trainer.critic is not None
    start = time.perf_counter()
    variance, history, images = _pretrained(trainer, cell)
    seconds = time.perf_counter() - start
    row: dict[str, Any] = {
        "explained_variance": variance.mean(dim=-1).tolist(),
        "score": bounds.score(variance).mean(dim=-1).tolist(),
        "overall_score": bounds.overall_score(variance),
        "history": history,
        "parameters": sum(parameter.numel() for parameter in trainer.critic.parameters()),
        "images": images,
        "seconds_value_pretraining": seconds,
    }
    if cell.measure == "iterations" and scale.train_iterations:
        rewards, explained = [], []
        for _ in range(scale.train_iterations):
            metrics = trainer.train_iteration()
            rewards.append(float(metrics["reward/shapes"]))
            explained.append(float(torch.as_tensor(metrics["explained_variance"]).nanmean()))
        row |= {"rewards": rewards, "explained_variance_training": explained}
        row["evaluation"] = trainer.evaluate().means()
        row["images_in_all"] = trainer.images
    return row


def _pretrained(trainer: LatentActorCriticTrainer, cell: Cell) -> tuple[Tensor, list[float], int]:
    """Held-out explained variance (T, M) after value pretraining, its history, and the images it took."""
    assert trainer.critic is not None
    if cell.iterations:
        result = trainer.pretrain_critic()
        return result.explained_variance, result.history, result.images
    held_out = trainer.collect(
        trainer.held_out.cycle(trainer.config.pretrain.held_out_samples), SELECTION_IDS
    )
    assert held_out is not None
    return held_out_variance(trainer.critic, held_out, trainer.normalizer), [], 0


def table(stored: dict[str, Any]) -> list[str]:
    """Markdown: means over the seeds; explained variance of the early and of the late half of the steps."""
    lines = [
        "| critic | seeds | EV early | EV late | score | images | s |",
        "|---|---|---|---|---|---|---|",
    ]
    groups: dict[str, list[dict[str, Any]]] = {}
    for key, cell in stored["cells"].items():
        groups.setdefault(key.rsplit("/", 1)[0], []).append(cell)
    for name, rows in groups.items():
        variance = torch.tensor([row["explained_variance"] for row in rows])
        middle = variance.shape[1] // 2
        numbers = (
            float(variance[:, :middle].mean()),
            float(variance[:, middle:].mean()),
            statistics.mean(row["overall_score"] for row in rows),
        )
        columns = " | ".join(f"{number:.3f}" for number in numbers)
        seconds = statistics.mean(row["seconds_value_pretraining"] for row in rows)
        lines.append(f"| {name} | {len(rows)} | {columns} | {rows[0]['images']} | {seconds:.0f} |")
    return lines
