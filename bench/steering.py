"""Steering against best-of-n at equal NFE: settings chosen on tuning prompts, judged on held-out ones.

python -m bench.steering runs/shapes --budget 40 --out bench/results/steering-shapes.json

Every method gets the same forwards per image (a backward counts two). Its settings are those of the highest
reward on tuning prompts; then all methods meet the same held-out prompts and seeds, trajectory 0 of an image
with the same noise. Differences from best-of-n with the same chooser are paired by image; their 95 % interval
is a bootstrap over prompts. Cells that the JSON holds are not measured again: a run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.steering_arms import BASELINE, UNSTEERED, arms
from lacfast import presets
from lacfast.backbones import load_backbone
from lacfast.backbones.latent import LatentBackbone
from lacfast.config import SamplerConfig, SteeringConfig
from lacfast.metrics import diversity
from lacfast.prompts import PromptSet
from lacfast.run import prompts_of
from lacfast.steering import steer
from lacfast.steering_run import saved_model, trained_sampler

TUNING_SEED = 1_000_003
"""Far from the seeds that are reported."""
RESAMPLES = 4000


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What makes two cells comparable; a JSON of other settings is refused."""

    model: str
    """Hash of the weights of policy and critic."""
    sampler: dict[str, Any]
    budget: float
    reward: str
    gold: tuple[str, ...]
    tuning_prompts: str
    prompts: str
    tuning_images: int
    images: int


class Record:
    """Cells by key in a JSON that is replaced whole after each."""

    def __init__(self, path: Path, settings: Settings) -> None:
        self.path = path
        wanted = json.loads(json.dumps(asdict(settings)))
        self.content: dict[str, Any] = {"settings": wanted, "cells": {}}
        if path.exists():
            found = json.loads(path.read_text(encoding="utf-8"))
            if found["settings"] != wanted:
                different = [name for name in wanted if found["settings"].get(name) != wanted[name]]
                raise ValueError(
                    f"{path} is of other settings ({', '.join(different)}); choose another --out"
                )
            self.content = found

    def cell(self, key: str, measure: Any) -> dict[str, Any]:
        """The cell, measured if it is not there yet."""
        cells = self.content["cells"]
        if key not in cells:
            cells[key] = measure()
            self.write()
        found: dict[str, Any] = cells[key]
        return found

    def write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.content, indent=1) + "\n", encoding="utf-8")
        os.replace(temporary, self.path)


def measure(
    backbone: LatentBackbone,
    sampler: SamplerConfig,
    config: SteeringConfig,
    prompts: PromptSet,
    settings: Settings,
) -> dict[str, Any]:
    """One call of steer: cost, scores per image, diversity per prompt."""
    start = time.perf_counter()
    images, stats = steer(
        backbone, prompts, config, sampler=sampler, rewards=settings.reward, gold=list(settings.gold)
    )
    scores = {name: [round(score, 4) for score in found.tolist()] for name, found in stats.rewards.items()}
    scores |= {name: [round(score, 4) for score in found.tolist()] for name, found in stats.gold.items()}
    return {
        "evaluations_per_image": stats.evaluations.per_image,
        "reward_calls_per_image": stats.reward_calls / len(prompts),
        "value": float(stats.values[-1].mean()),
        "diversity": diversity(images, prompts.texts),
        "scores": scores,
        "seconds": round(time.perf_counter() - start, 2),
    }


def tuned(
    record: Record,
    backbone: LatentBackbone,
    sampler: SamplerConfig,
    candidates: list[SteeringConfig],
    settings: Settings,
) -> SteeringConfig:
    """The candidate of the highest mean reward on the tuning prompts."""
    prompts = prompts_of(settings.tuning_prompts).draw(settings.tuning_images, seed=TUNING_SEED, iteration=0)
    means = []
    for candidate in candidates:
        config = SteeringConfig(**(asdict(candidate) | {"seed": TUNING_SEED}))
        cell = record.cell(
            f"tuning {_key(candidate)}",
            lambda config=config: measure(backbone, sampler, config, prompts, settings),  # type: ignore[misc]
        )
        means.append(float(np.mean(cell["scores"][settings.reward])))
    return candidates[int(np.argmax(means))]


def spread(candidates: list[SteeringConfig], count: int) -> list[SteeringConfig]:
    """At most `count` of them, evenly spaced."""
    rows = np.linspace(0, len(candidates) - 1, min(count, len(candidates))).round().astype(int)
    return [candidates[row] for row in rows]


def paired_interval(
    scores: np.ndarray, baseline: np.ndarray, prompts: list[str], *, resamples: int = RESAMPLES
) -> tuple[float, float, float]:
    """Mean difference of scores (n,) of the same images, and its 95 % bootstrap interval over prompts."""
    names = sorted(set(prompts))
    rows = [[index for index, text in enumerate(prompts) if text == name] for name in names]
    sums = np.array([(scores[row] - baseline[row]).sum() for row in rows])
    counts = np.array([len(row) for row in rows], dtype=float)
    chosen = np.random.default_rng(0).integers(len(names), size=(resamples, len(names)))
    means = sums[chosen].sum(axis=1) / counts[chosen].sum(axis=1)
    low, high = np.quantile(means, (0.025, 0.975))
    return float(sums.sum() / counts.sum()), float(low), float(high)


def table(cells: dict[str, dict[str, list[dict[str, Any]]]], prompts: list[str], names: list[str]) -> str:
    """Rows of methods, seeds together; differences from best-of-n with the same chooser.

    Args:
        cells: chooser -> method -> one cell per seed.
        prompts: of every cell's images.
        names: scores to show.
    """
    lines = []
    for chooser, methods in cells.items():
        lines.append(f"chosen by {chooser}")
        for method, runs in methods.items():
            first = runs[0]
            row = f"  {method:<20} NFE {first['evaluations_per_image']:6.2f}  "
            row += f"reward calls {first['reward_calls_per_image']:4.1f}  "
            row += f"V {np.mean([run['value'] for run in runs]):6.3f}  "
            for name in names:
                scores, base = (
                    np.concatenate([np.array(run["scores"][name]) for run in found])
                    for found in (runs, methods[BASELINE])
                )
                difference, low, high = paired_interval(scores, base, prompts * len(runs))
                row += f"{name} {scores.mean():.3f} ({difference:+.3f} [{low:+.3f}, {high:+.3f}])  "
            row += f"diversity {np.mean([run['diversity'] for run in runs]):.4f}"
            lines.append(row)
    return "\n".join(lines)


def _key(config: SteeringConfig) -> str:
    """The settings that differ from the defaults."""
    default = asdict(SteeringConfig())
    return json.dumps({name: value for name, value in asdict(config).items() if value != default[name]})


def weights_hash(backbone: LatentBackbone) -> str:
    digest = hashlib.sha256()
    assert backbone.critic is not None
    for state in (backbone.policy_state(), backbone.critic.state_dict()):
        for name, tensor in sorted(state.items()):
            digest.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", help="a run, a demo's directory or a checkpoint: policy and critic")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "steering.json")
    parser.add_argument("--budget", type=float, default=40.0, help="NFE per image")
    parser.add_argument("--reward", default="shapes", help="that the critic was trained on")
    parser.add_argument("--gold", nargs="+", default=["shapes_strict", "shapes_gold"])
    parser.add_argument("--tuning-prompts", default="shapes")
    parser.add_argument("--prompts", default="shapes-held-out")
    parser.add_argument("--tuning-images", type=int, default=240)
    parser.add_argument("--images", type=int, default=480)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--choosers", nargs="+", default=["value", "reward"], choices=["value", "reward"])
    parser.add_argument("--candidates", type=int, default=0, help="most settings per method; 0: all")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    saved = saved_model(options.run)
    sampler = trained_sampler(saved) or presets.shapes("dit").sampler
    backbone = load_backbone(saved)
    if backbone.critic is None:
        raise ValueError(f"{saved} has no critic to steer with; train one first")
    settings = Settings(
        model=weights_hash(backbone),
        sampler=asdict(sampler),
        budget=options.budget,
        reward=options.reward,
        gold=tuple(options.gold),
        tuning_prompts=options.tuning_prompts,
        prompts=options.prompts,
        tuning_images=options.tuning_images,
        images=options.images,
    )
    record = Record(options.out, settings)
    transitions = backbone.transition_table(sampler)
    prompts = prompts_of(options.prompts).cycle(options.images)
    cells: dict[str, dict[str, list[dict[str, Any]]]] = {}
    chosen: dict[str, dict[str, Any]] = {}
    for chooser in options.choosers:
        for method, candidates in arms(transitions, sampler, options.budget, chooser).items():
            tried = spread(candidates, options.candidates) if options.candidates else candidates
            best = tuned(record, backbone, sampler, tried, settings)
            chosen.setdefault(chooser, {})[method] = json.loads(_key(best))
            for seed in range(options.seeds):
                config = SteeringConfig(**(asdict(best) | {"seed": seed}))
                cell = record.cell(
                    f"held out, seed {seed} {_key(best)}",
                    lambda config=config: measure(backbone, sampler, config, prompts, settings),
                )
                cells.setdefault(chooser, {}).setdefault(method, []).append(cell)
            print(f"{chooser}, {method}: {_key(best)}", flush=True)
    names = [options.reward, *options.gold]
    report = table(cells, prompts.texts, names)
    record.content |= {
        "chosen": chosen,
        "table": report.splitlines(),
        "torch": torch.__version__,
        "machine": platform.machine(),
    }
    record.write()
    print(report)


__all__ = ["UNSTEERED", "main", "measure", "paired_interval", "table"]

if __name__ == "__main__":
    main()
