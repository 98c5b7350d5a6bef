"""Explained variance by step of every critic between the prompts' floor and the states' ceiling.

One cell is one critic on one seed: value pretraining with the actor frozen on prompts that train, the best
state chosen on tuning prompts, then the explained variance on held-out ones; for "iterations" PPO comes after
it. A cell is a unit of the study, so a run that stopped goes on.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.learning import units
from bench.learning.controls import CONTROL_TRUNKS
from bench.learning.problems import Materials, Prompts
from bench.learning.study_config import study_config
from lacfast import CriticConfig
from lacfast.config import TrainConfig
from lacfast.learning.value_bounds import ValueBounds
from lacfast.learning.value_pretraining import held_out_variance
from lacfast.prompts import PromptSet
from lacfast.records import Rollout
from lacfast.tasks import scenes
from lacfast.tasks.models import BackboneName
from lacfast.trainer import LatentActorCriticTrainer

MEASURES = ("trunks", "iterations", "time", "text", "loss")
TRUNKS = ("branch", "shared", "lora", "copy", "clean_net", *CONTROL_TRUNKS)
ITERATIONS = (0, 5, 15, 40)
VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    # prompt_only reads the prompt already and refuses it twice.
    "trunks": {trunk: {"trunk": trunk} for trunk in TRUNKS}
    | {"prompt_only": {"trunk": "prompt_only", "text_conditioning": "none"}},
    "time": {"with the timestep": {"time_conditioning": True}, "without": {"time_conditioning": False}},
    "text": {name: {"text_conditioning": name} for name in ("none", "pooled", "tokens")},
    "loss": {name: {"loss": name} for name in ("mse", "bce", "hl_gauss")},
}
"""Measure -> name in its table -> what differs from `branch_preset`."""
REPORT_IDS = 1 << 44
"""First sample id of the states that are reported; never the trainer's."""


@dataclass(frozen=True)
class Scale:
    """How much is sampled; a study holds cells of one scale."""

    batch_size: int
    """Trajectories per rollout."""
    iterations: int
    """Iterations of value pretraining, but for the measure "iterations"."""
    held_out_samples: int
    """Images of the rollout that chooses the best state of value pretraining."""
    reported_samples: int
    """Images of the rollout that is reported; 120 give every held-out prompt twice, which the floor needs."""
    completions: int
    bound_states: int
    train_iterations: int
    """Iterations of PPO after value pretraining, for the measure "iterations"."""
    eval_samples: int


@dataclass(frozen=True)
class Cell:
    """One critic; the same one may stand in the tables of several measures."""

    measure: str
    name: str
    """In the measure's table."""
    critic: CriticConfig
    iterations: int
    key: str
    """What differs from the preset, the start of its unit's key."""


def cells(measures: Sequence[str], preset: CriticConfig, scale: Scale) -> Iterator[Cell]:
    """Every critic of every measure."""
    for measure in measures:
        if measure == "iterations":
            for count in ITERATIONS:
                yield Cell(measure, str(count), preset, count, f"iterations-{count}")
            continue
        for name, changes in VARIANTS[measure].items():
            different = {field: value for field, value in changes.items() if getattr(preset, field) != value}
            key = "-".join(f"{field}-{value}".lower() for field, value in different.items()) or "preset"
            yield Cell(measure, name, replace(preset, **changes), scale.iterations, key)


def run(
    materials: Materials,
    backbone: BackboneName,
    measures: Sequence[str],
    seeds: Sequence[int],
    scale: Scale,
    study: Path,
    *,
    deadline: float = math.inf,
) -> None:
    """Measure what the study does not hold yet, seed by seed; begin nothing after the deadline.

    Raises:
        ValueError: when the study holds cells of another preset or scale.
    """
    preset = branch_preset(backbone)
    digest = units.digest(units.changed(preset))
    settings = {"backbone": backbone, "preset": digest, "scale": asdict(scale), "torch": torch.__version__}
    units.require_settings(study, settings)
    for seed in seeds:
        key = f"bounds-seed{seed}"
        if key not in units.load(study) and time.monotonic() > deadline:
            return

        def measure_bounds(seed: int = seed) -> dict[str, Any]:
            made = _trainer(materials, backbone, preset, scale, preset.critic, seed, 1, measures_bounds=True)
            return _bounds(made, scale)

        bounds = units.done(study, key, measure_bounds)
        # Another process is measuring the bounds: it has this seed's cells too.
        if bounds is None:
            continue
        for cell in cells(measures, preset.critic, scale):
            key = f"{cell.key}-seed{seed}"
            is_new = key not in units.load(study)
            if is_new and time.monotonic() > deadline:
                return

            def work(cell: Cell = cell, seed: int = seed, bounds: dict[str, Any] = bounds) -> dict[str, Any]:
                trainer = _trainer(materials, backbone, preset, scale, cell.critic, seed, cell.iterations)
                return {"seed": seed} | _measure(trainer, cell, value_bounds(bounds), scale)

            row = units.done(study, key, work)
            if row is not None and is_new:
                score, seconds = row["overall_score"], row["seconds_value_pretraining"]
                print(f"{key}: score {score:.3f}, value pretraining {seconds:.0f} s", flush=True)


def branch_preset(backbone: BackboneName) -> TrainConfig:
    """What variants differ from: the demo's settings with a branch."""
    return study_config(backbone, "branch")


def value_bounds(unit: dict[str, Any]) -> ValueBounds:
    """Floor and ceiling that a unit holds."""
    return ValueBounds(torch.tensor(unit["floor"]), torch.tensor(unit["ceiling"]), unit["images"])


def _trainer(
    materials: Materials,
    backbone: BackboneName,
    preset: TrainConfig,
    scale: Scale,
    critic: CriticConfig,
    seed: int,
    iterations: int,
    *,
    measures_bounds: bool = False,
) -> LatentActorCriticTrainer:
    # A rare 1 must not be cut out of a probability's targets.
    ppo = replace(preset.ppo, target_clip=math.inf) if critic.loss == "bce" else preset.ppo
    pretrain = replace(
        preset.pretrain,
        iterations=max(iterations, 1),
        patience=max(iterations, 1),
        held_out_samples=scale.held_out_samples,
    )
    # Once for all critics of a seed.
    if measures_bounds:
        pretrain = replace(pretrain, completions=scale.completions, bound_states=scale.bound_states)
    prompts = Prompts.of(scenes.TASK)
    return LatentActorCriticTrainer(
        materials.backbone(scenes.TASK, backbone),
        "shapes",
        prompts.train,
        replace(
            preset,
            seed=seed,
            batch_size=scale.batch_size,
            critic=critic,
            ppo=ppo,
            eval_samples=scale.eval_samples,
            pretrain=pretrain,
        ),
        held_out=prompts.tuning,
        evaluation_rewards=["shapes_strict"],
    )


def _reported_states(trainer: LatentActorCriticTrainer, scale: Scale) -> Rollout:
    """A rollout of held-out prompts that nothing was chosen by; its images count nowhere."""
    prompts = PromptSet.create(Prompts.of(scenes.TASK).held_out)
    rollout = trainer.collect(prompts.cycle(scale.reported_samples), REPORT_IDS)
    assert rollout is not None
    trainer.images -= rollout.batch_size
    return rollout


def _bounds(trainer: LatentActorCriticTrainer, scale: Scale) -> dict[str, Any]:
    """Floor and ceiling of the frozen actor; the same for every critic of a seed."""
    bounds = trainer.measure_bounds(_reported_states(trainer, scale))
    return {"floor": bounds.floor.tolist(), "ceiling": bounds.ceiling.tolist(), "images": bounds.images}


def _measure(
    trainer: LatentActorCriticTrainer, cell: Cell, bounds: ValueBounds, scale: Scale
) -> dict[str, Any]:
    assert trainer.critic is not None
    start = time.process_time()
    history = trainer.pretrain_critic().history if cell.iterations else []
    seconds, images = time.process_time() - start, trainer.images
    variance: Tensor = held_out_variance(trainer.critic, _reported_states(trainer, scale), trainer.normalizer)
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
        trainer.held_out = PromptSet.create(Prompts.of(scenes.TASK).held_out)
        row |= {"rewards": rewards, "explained_variance_training": explained}
        row["evaluation"] = trainer.evaluate().means()
        row["images_in_all"] = trainer.images
    return row
