"""Steering against best-of-n at equal NFE: settings chosen on tuning prompts, judged on held-out ones.

    python -m bench.learning.steering                  DiT: 30 to 60 minutes of a core
    python -m bench.learning.steering --minutes 20     begins nothing after these; the next call goes on
    python -m bench.learning.steering runs/shapes --out bench/results/learning/steering/shapes

Every seed has a critic of its own, pretrained on the base model and trained with the policy for --train-
iterations, on prompts that neither choose nor report. Every method gets the same forwards per image (a
backward counts two) and the settings that had the highest reward on tuning prompts, with a critic whose
seed is not reported. Then all methods meet the same held-out prompts and noise. With saved models instead,
a run of `lacfast train` has trained on the tuning prompts too. Each unit is kept in
bench/results/learning/steering; docs/results.md has the table.
"""

from __future__ import annotations

import argparse
import hashlib
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.learning import page, units
from bench.learning.critic_variance import TRUNKS
from bench.learning.problems import Materials, Prompts
from bench.learning.steering_arms import arms
from bench.learning.study_config import study_config
from lacfast.backbones import load_backbone
from lacfast.backbones.latent import LatentBackbone
from lacfast.checkpoint import save_backbone
from lacfast.config import SamplerConfig, SteeringConfig, TrainConfig
from lacfast.metrics import diversity
from lacfast.prompts import PromptSet
from lacfast.runs.saved import saved_model, trained_sampler
from lacfast.steering import steer
from lacfast.tasks import scenes
from lacfast.tasks.models import BackboneName
from lacfast.trainer import LatentActorCriticTrainer

RESULTS = Path(__file__).resolve().parents[1] / "results" / "learning"
TUNING_SEED = 1_000_003
"""Far from the seeds that are reported."""
REWARD = "shapes"
GOLD = ("shapes_strict", "shapes_gold")
CHOOSERS = ("value", "reward")


@dataclass(frozen=True, kw_only=True)
class Study:
    """What is compared at one budget."""

    backbone: BackboneName
    sampler: SamplerConfig
    budget: float
    """Most NFE per image."""
    images: int
    """Held-out, per seed."""
    tuning_images: int
    candidates: int
    """Most settings that a method is tried with; 0: all."""
    training: dict[str, Any]
    """How the critics were made, or the saved models that have them."""

    def settings(self) -> dict[str, Any]:
        return asdict(self) | {"reward": REWARD, "gold": GOLD}


Models = Callable[[int], LatentBackbone]
"""Seed -> a policy and its critic."""


def trained_critic(
    materials: Materials, backbone: BackboneName, config: TrainConfig, *, iterations: int, seed: int
) -> LatentBackbone:
    """The base model with a critic of this seed, after `iterations` of training; made once."""
    prompts = Prompts.of(scenes.TASK)
    made = units.digest(units.changed(config) | {"trained": iterations})
    name = f"{scenes.TASK.name}-{backbone}-critic-{made}-{seed}"
    target = materials.folder / name
    if not target.exists():
        trainer = LatentActorCriticTrainer(
            materials.backbone(scenes.TASK, backbone),
            REWARD,
            prompts.train,
            replace(config, seed=seed),
            held_out=prompts.tuning,
        )
        trainer.pretrain_critic()
        for _ in range(iterations):
            trainer.train_iteration()
        with trainer.averaged():
            save_backbone(trainer.backbone, target)
    return load_backbone(str(target))


def measure(
    backbone: LatentBackbone, study: Study, config: SteeringConfig, prompts: PromptSet
) -> dict[str, Any]:
    """One call of steer: cost, scores per image, diversity per prompt."""
    start = time.process_time()
    images, stats = steer(backbone, prompts, config, sampler=study.sampler, rewards=REWARD, gold=list(GOLD))
    scores = {
        name: [round(score, 4) for score in found.tolist()]
        for name, found in (stats.rewards | stats.gold).items()
    }
    return {
        "forwards_per_image": stats.evaluations.forwards / len(prompts),
        "backwards_per_image": stats.evaluations.backwards / len(prompts),
        "evaluations_per_image": stats.evaluations.per_image,
        "reward_calls_per_image": stats.reward_calls / len(prompts),
        "value": float(stats.values[-1].mean()),
        "diversity": diversity(images, prompts.texts),
        "scores": scores,
        "seconds": round(time.process_time() - start, 2),
    }


def tuned(
    folder: Path,
    study: Study,
    models: Models,
    name: str,
    candidates: list[SteeringConfig],
    deadline: float,
) -> SteeringConfig | None:
    """The candidate of the highest mean reward on the tuning prompts; None: not all have been tried yet."""
    tried = spread(candidates, study.candidates) if study.candidates else candidates
    if len(tried) == 1:
        return tried[0]
    prompts = PromptSet.create(Prompts.of(scenes.TASK).tuning).cycle(study.tuning_images)
    means = []
    for candidate in tried:

        def work(candidate: SteeringConfig = candidate) -> dict[str, Any]:
            config = replace(candidate, seed=TUNING_SEED)
            return {"steering": units.changed(candidate)} | measure(
                models(TUNING_SEED), study, config, prompts
            )

        key = f"tuning/{name}-{units.digest(units.changed(candidate))}"
        if key not in units.load(folder) and time.monotonic() > deadline:
            return None
        unit = units.done(folder, key, work)
        if unit is None:
            return None
        means.append(float(np.mean(unit["scores"][REWARD])))
    return tried[int(np.argmax(means))]


def perform(
    folder: Path, study: Study, models: Models, seeds: int, choosers: list[str], deadline: float
) -> None:
    """Tune every method, then measure them seed by seed; begin nothing after the deadline.

    Raises:
        ValueError: when the file holds another study, or a unit with settings that are not chosen now.
    """
    units.require_settings(folder, study.settings())
    table = models(TUNING_SEED).transition_table(study.sampler)
    chosen: dict[tuple[str, str], SteeringConfig] = {}
    for chooser in choosers:
        for method, candidates in arms(table, study.sampler, study.budget, chooser).items():
            best = tuned(folder, study, models, _key(chooser, method), candidates, deadline)
            if best is not None:
                chosen[chooser, method] = best
    prompts = PromptSet.create(Prompts.of(scenes.TASK).held_out).cycle(study.images)
    for seed in range(seeds):
        for (chooser, method), best in chosen.items():

            def work(
                chooser: str = chooser, method: str = method, best: SteeringConfig = best, seed: int = seed
            ) -> dict[str, Any]:
                described = {
                    "chooser": chooser,
                    "method": method,
                    "seed": seed,
                    "steering": units.changed(best),
                }
                return described | measure(models(seed), study, replace(best, seed=seed), prompts)

            key = f"{_key(chooser, method)}-seed{seed}"
            if key not in units.load(folder) and time.monotonic() > deadline:
                return
            unit = units.done(folder, key, work)
            if unit is not None and unit["steering"] != units.changed(best):
                raise ValueError(
                    f"{key} of {folder} was steered with {unit['steering']}, "
                    f"tuning now chooses {units.changed(best)}; choose another --out"
                )
            if unit is not None:
                strict = np.mean(unit["scores"][GOLD[0]])
                print(
                    f"{key}: NFE {unit['evaluations_per_image']:.1f}, {GOLD[0]} {strict:.3f}",
                    flush=True,
                )


def spread(candidates: list[SteeringConfig], count: int) -> list[SteeringConfig]:
    """At most `count` of them, evenly spaced."""
    rows = np.linspace(0, len(candidates) - 1, min(count, len(candidates))).round().astype(int)
    return [candidates[row] for row in rows]


def _key(chooser: str, method: str) -> str:
    return f"{chooser}-{method.replace(', ', '-').replace(' ', '-')}"


def _saved(runs: list[str]) -> Models:
    """Models of saved runs in turn; the first one tunes."""
    found = [saved_model(run) for run in runs]

    def load(seed: int) -> LatentBackbone:
        backbone = load_backbone(found[0 if seed == TUNING_SEED else seed % len(found)])
        if backbone.critic is None:
            raise ValueError(f"{runs} has a model without a critic to steer with; train one first")
        return backbone

    return load


def _weights(backbone: LatentBackbone) -> str:
    """Hash of policy and critic."""
    digest = hashlib.sha256()
    assert backbone.critic is not None
    for state in (backbone.policy_state(), backbone.critic.state_dict()):
        for name, tensor in sorted(state.items()):
            digest.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def _kept(models: Models) -> Models:
    """The last model again without loading it: units of one seed follow each other."""
    last: dict[int, LatentBackbone] = {}

    def model(seed: int) -> LatentBackbone:
        if seed not in last:
            last.clear()
            last[seed] = models(seed)
        return last[seed]

    return model


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "runs", nargs="*", help="saved policies with critics, one per seed; none: they are made"
    )
    parser.add_argument(
        "--out", type=Path, help="file of the study without .json; default: steering/BACKBONE[-TRUNK]"
    )
    parser.add_argument("--backbone", choices=("dit", "unet"), default="dit")
    parser.add_argument(
        "--materials", type=Path, default=Path("runs/learning"), help="base models and critics"
    )
    parser.add_argument(
        "--train-iterations", type=int, default=30, help="of the policy, after value pretraining"
    )
    parser.add_argument("--trunk", choices=TRUNKS, help="of the critics that are made; default: the preset's")
    parser.add_argument("--budget", type=float, default=40.0, help="NFE per image")
    parser.add_argument("--tuning-images", type=int, default=144)
    parser.add_argument("--images", type=int, default=480, help="per seed")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--choosers", nargs="+", default=list(CHOOSERS), choices=CHOOSERS)
    parser.add_argument("--candidates", type=int, default=6, help="most settings per method; 0: all")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no unit after these")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    deadline = time.monotonic() + 60 * options.minutes
    config, study_name = study_config(options.backbone, options.trunk), options.backbone
    if config != study_config(options.backbone):
        study_name = f"{options.backbone}-{options.trunk}"
    if options.runs:
        models = _kept(_saved(options.runs))
        sampler = trained_sampler(saved_model(options.runs[0])) or config.sampler
        count = len(options.runs)
        training: dict[str, Any] = {"models": [_weights(models(seed)) for seed in range(count)]}
    else:
        sampler = config.sampler
        training = {
            "config": units.digest(units.changed(config)),
            "trunk": config.critic.trunk,
            "iterations": options.train_iterations,
        }
        materials = Materials(options.materials)
        models = _kept(
            lambda seed: trained_critic(
                materials, options.backbone, config, iterations=options.train_iterations, seed=seed
            )
        )
    study = Study(
        backbone=options.backbone,
        sampler=sampler,
        budget=options.budget,
        images=options.images,
        tuning_images=options.tuning_images,
        candidates=options.candidates,
        training=training,
    )
    perform(
        options.out or RESULTS / "steering" / study_name,
        study,
        models,
        options.seeds,
        options.choosers,
        deadline,
    )
    page.write(RESULTS)


if __name__ == "__main__":
    main()
