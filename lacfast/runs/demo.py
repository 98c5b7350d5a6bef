"""The demo: a tiny diffusion model learns with its critic to obey its prompts, and shows it.

Pretrain (or load) -> evaluate -> value pretraining -> steer -> train for the rest of the time -> evaluate ->
steer -> save and load again -> report. Trainer, adapters, ops and files are those of large models.
"""

from __future__ import annotations

import json
import math
import platform
import sys
import time
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lacfast.backbone import Backbone
from lacfast.backbones import adapt_pretrained, load_backbone
from lacfast.checkpoint import save_backbone
from lacfast.config import SteeringConfig, TrainConfig, to_json
from lacfast.config.checks import require
from lacfast.distributed import World
from lacfast.records import Evaluation, NoiseKey
from lacfast.report.demo import write_report
from lacfast.report.pictures import Gallery, save_pictures
from lacfast.rollout.sampler import RolloutSampler
from lacfast.rollout.scored import unwatched
from lacfast.runs.directory import DEMO, require_own
from lacfast.runs.launch import joined_by
from lacfast.runs.phases import pretrain_model, show_value_pretraining
from lacfast.runs.recipes import recipe
from lacfast.runs.terminal import PhaseLog, done_fraction, phase_log
from lacfast.runtime.directories import locked, whole_directory
from lacfast.runtime.files import require_writable, write_json
from lacfast.runtime.graph import GraphRunner
from lacfast.steering import SteeringStats
from lacfast.steering.ranks import steer_together
from lacfast.tasks import scenes
from lacfast.tasks.models import BackboneName
from lacfast.tasks.pretraining import CONFIGS, Pretrained
from lacfast.tasks.shapes import (
    held_out_prompts,
    shapes_background,
    shapes_gold,
    shapes_strict,
    train_prompts,
)
from lacfast.tasks.storage import load_pretrained, save_pretrained
from lacfast.trainer import LatentActorCriticTrainer

RECIPES = {"dit": "shapes", "unet": "shapes-unet"}
"""Backbone -> the recipe that the demo follows."""
REWARD = "shapes"
STRICT = "shapes_strict"
GOLD = "shapes_gold"
PARTICLES = 4
"""Trajectories of a steered image, pruned to one: 25 forwards over 8 steps."""
BACKGROUND = "shapes_background"
JUDGES = (shapes_strict, shapes_gold, shapes_background)
"""What is never trained on."""
GAUGINGS = 5
"""Small evaluations within reinforcement learning, for the curves."""
GAUGED_SAMPLES = 240
"""Images of each of them."""
RELOAD_SAMPLES = 16
REPORT_SECONDS = 8.0
"""Set aside for saving, pictures and the report."""
GALLERY_STRIDE = 5
"""Every fifth held-out prompt is pictured: chosen by position, not by outcome."""


Steered = tuple[Tensor, SteeringStats]
"""Images (n, 3, H, W), and what they cost and scored."""


@dataclass(frozen=True, kw_only=True)
class DemoScale:
    """How much work the phases of fixed length do; reinforcement learning takes what the budget leaves."""

    pretrain_steps: int | None = None
    """Optimizer steps of the base model. None: the task's recipe."""
    evaluation_samples: int = 1024
    """Images per evaluation, steered ones too; the standard error of an accuracy near 0.5 is 0.016."""
    value_iterations: int | None = None
    """Most iterations of value pretraining. None: the recipe's."""
    batch_size: int | None = None
    """Trajectories per rollout. None: the recipe's."""
    min_iterations: int = 3
    """Iterations of reinforcement learning that run even when the budget is spent."""


FULL = DemoScale()
QUICK = DemoScale(pretrain_steps=120, evaluation_samples=240, value_iterations=3, batch_size=64)
"""Shows that everything runs; too short to show that it learns."""
QUICK_BUDGET = 60.0
"""Most seconds of a quick demo, however slow the machine's other phases leave room."""


def run_demo(
    out: Path,
    *,
    budget: float = 465.0,
    seed: int = 0,
    backbone: BackboneName = "dit",
    processes: int = 1,
    scale: DemoScale = FULL,
    log: PhaseLog | None = None,
) -> dict[str, Any]:
    """Write summary.json, metrics.jsonl, run.json, images/, report.html, pretrained/ and trained/ to `out`.

    Args:
        out: made when it does not exist; a base model of the same recipe that lies there is used again.
        budget: seconds in all; reinforcement learning gets what the other phases leave, or a few iterations.
        seed: of everything.
        backbone: "dit" (SD3's transformer) or "unet" (Stable Diffusion's), both tiny.
        processes: that sample and train together, each on one thread: two on two cores do nearly twice as
            much. The others are new interpreters, so a script calls this under `if __name__ == "__main__"`.
        scale: how much work the other phases do.
        log: where to show progress. None: the terminal.

    Returns:
        What summary.json holds.

    Raises:
        ValueError: for an `out` that cannot be written, one that another demo writes to, or settings out of
            range, before any work.
    """
    require(budget > 0, f"--budget {budget:g} must be more than 0 seconds; the demo's own choice is 465")
    config = _config(backbone, seed, scale)
    largest = min(CONFIGS[backbone].batch_size, config.batch_size, scale.evaluation_samples)
    require(
        1 <= processes <= largest,
        f"--processes {processes} must be from 1 to {largest}, one for each image of the smallest batch",
    )
    require_own(out, DEMO)
    require_writable(out)
    settings = out, config, budget, backbone, scale
    with locked(out), joined_by(processes, _demo, *settings):
        return _demo(*settings, log)


def _demo(
    out: Path,
    config: TrainConfig,
    budget: float,
    backbone: BackboneName,
    scale: DemoScale,
    log: PhaseLog | None = None,
) -> dict[str, Any]:
    """`run_demo` on every rank; the first one writes, and returns the summary."""
    torch.set_num_threads(1)
    world, seed = World.current(), config.seed
    log = log or phase_log(world)
    steering = SteeringConfig(particles=PARTICLES, seed=seed)
    if world.is_first:
        (out / "metrics.jsonl").unlink(missing_ok=True)
        # As of a run of lacfast train: later commands find the sampler here.
        write_json(out / "run.json", {"train": to_json(config)})
    base = adapt_pretrained(_base_model(world, out / "pretrained", backbone, seed, scale, log))
    trainer = LatentActorCriticTrainer(
        base,
        REWARD,
        train_prompts(),
        config,
        held_out=held_out_prompts(),
        evaluation_rewards=list(JUDGES),
        metrics_path=out / "metrics.jsonl" if world.is_first else None,
    )
    before = _evaluate(trainer, "Base model, held-out prompts", log)
    show_value_pretraining(trainer, log)
    steered_before = _steer(trainer, steering, "Base model, steered", log)
    _train(trainer, world.of_first(budget - log.elapsed - _remaining_cost(log), "the clock"), scale, log)
    after = _evaluate(trainer, "Trained model, held-out prompts", log)
    with trainer.averaged():
        steered_after = _steer(trainer, steering, "Trained model, steered", log)
        if not world.is_first:
            return {}
        with log.phase("saving", "Save and load again") as phase:
            save_backbone(trainer.backbone, out / "trained")
            _require_identical_samples(trainer, load_backbone(out / "trained"))
            phase.note = "the loaded model samples bit for bit the same"
    trainer.log.close()

    scores = {"reward": REWARD, "strict": STRICT, "gold": GOLD, "background": BACKGROUND}
    steered: dict[str, float] = {}
    for end, (_, stats) in (("", steered_before), ("_after", steered_after)):
        steered |= {f"{name}{end}": _mean(stats, scores[name]) for name in ("strict", "gold", "background")}
        steered[f"forwards_per_image{end}"] = stats.evaluations.per_image
    summary: dict[str, Any] = {
        **{f"{name}_before": before.means()[score] for name, score in scores.items()},
        **{f"{name}_after": after.means()[score] for name, score in scores.items()},
        "steered": steered,
        "latent_drift": trainer.drift.update(after),
        "explained_variance": after.explained_variance.mean(dim=-1).tolist(),
        "images": trainer.images,
        "iterations": trainer.iteration,
        "evaluation_samples": scale.evaluation_samples,
        "seconds": {},
        "seed": seed,
        "backbone": backbone,
        "budget": budget,
        "quick": scale != FULL,
        "processes": world.size,
        "versions": _versions(),
    }
    with log.phase("report", "Pictures and report"):
        gallery = Gallery(
            before.prompts,
            columns={
                "before": (before.images, before.rewards[STRICT]),
                "after": (after.images, after.rewards[STRICT]),
                "before, steered": (steered_before[0], steered_before[1].gold[STRICT]),
                "after, steered": (steered_after[0], steered_after[1].gold[STRICT]),
            },
            stride=GALLERY_STRIDE,
        )
        save_pictures(gallery, out / "images")
        summary["seconds"] = {name: round(seconds, 2) for name, seconds in log.seconds.items()}
        settings = {"training": to_json(config), "steering": to_json(steering)}
        write_report(out, summary, gallery, settings)
    summary["seconds"] |= {"report": round(log.seconds["report"], 2), "total": round(log.elapsed, 2)}
    write_json(out / "summary.json", summary)
    return summary


def _config(backbone: BackboneName, seed: int, scale: DemoScale) -> TrainConfig:
    """The recipe's settings, for as long as the budget lasts and without evaluations of its own."""
    config = replace(
        recipe(RECIPES[backbone]).train,
        seed=seed,
        iterations=TrainConfig.iterations,
        eval_every=TrainConfig.eval_every,
        eval_samples=scale.evaluation_samples,
    )
    if scale.batch_size is not None:
        config = replace(config, batch_size=scale.batch_size)
    if scale.value_iterations is not None:
        held_out = min(config.pretrain.held_out_samples, scale.evaluation_samples)
        short = replace(config.pretrain, iterations=scale.value_iterations, held_out_samples=held_out)
        config = replace(config, pretrain=short)
    return config


def _base_model(
    world: World, directory: Path, backbone: BackboneName, seed: int, scale: DemoScale, log: PhaseLog
) -> Pretrained:
    """The pretrained model of this recipe, from `directory` or else made by all ranks and left there."""
    steps = scale.pretrain_steps or CONFIGS[backbone].steps
    recipe = {**asdict(CONFIGS[backbone]), "backbone": backbone, "seed": seed, "steps": steps}
    description = directory / "recipe.json"
    with log.phase("pretraining", f"Pretrain a tiny {backbone}") as phase:
        is_kept = description.exists() and json.loads(description.read_text(encoding="utf-8")) == recipe
        if world.of_first(is_kept, "the base model"):
            phase.note = f"loaded from {directory}"
            return load_pretrained(directory)

        model = pretrain_model(backbone, scenes.TASK, seed=seed, steps=steps, phase=phase, world=world)
        if world.is_first:
            with whole_directory(directory) as target:
                save_pretrained(model, target)
                write_json(target / description.name, recipe)
    return model


def _evaluate(trainer: LatentActorCriticTrainer, title: str, log: PhaseLog) -> Evaluation:
    with log.phase("evaluation", title) as phase:
        trainer.watch_evaluation = phase.images
        evaluation = trainer.evaluate()
        means = evaluation.means()
        phase.note = f"obeys {means[STRICT]:.1%} of {len(evaluation.prompts)} (gold {means[GOLD]:.1%})"
    return evaluation


def _train(trainer: LatentActorCriticTrainer, seconds: float, scale: DemoScale, log: PhaseLog) -> None:
    """Train for `seconds`, and for the floor of iterations whatever the clock says."""
    start = time.perf_counter()
    rewards: list[float] = []
    gauged = 0
    trainer.watch_evaluation = unwatched
    with log.phase("training", "Reinforcement learning") as phase:

        def report(metrics: dict[str, Any]) -> None:
            nonlocal gauged
            elapsed = trainer.world.of_first(time.perf_counter() - start, "the clock")
            if gauged < gaugings_due(elapsed, seconds):
                trainer.evaluate(samples=min(GAUGED_SAMPLES, trainer.config.eval_samples))
                gauged += 1
            rewards.append(metrics.get(f"reward/{REWARD}", math.nan))
            variance = float(metrics.get("explained_variance", torch.tensor(math.nan)).nanmean())
            fraction = done_fraction(len(rewards), elapsed, seconds, scale.min_iterations)
            note = f"iteration {metrics['iteration']}, reward {rewards[-1]:.3f}"
            phase.update(fraction, f"{note}, EV {variance:.2f}")

        done = trainer.train(sys.maxsize, seconds=seconds, on_iteration=report)
        trainer.train(max(scale.min_iterations - done, 0), on_iteration=report)
        phase.note = f"{trainer.iteration} iterations, training reward {rewards[0]:.3f} -> {rewards[-1]:.3f}"


def gaugings_due(elapsed: float, seconds: float) -> int:
    """Small evaluations that lie behind `elapsed` of the `seconds` of a phase, evenly spaced within it."""
    return min(int((GAUGINGS + 1) * elapsed / seconds), GAUGINGS) if seconds > 0 else 0


def _steer(trainer: LatentActorCriticTrainer, steering: SteeringConfig, title: str, log: PhaseLog) -> Steered:
    prompts = trainer.held_out.cycle(trainer.config.eval_samples)
    with log.phase("steering", title) as phase:
        images, stats = steer_together(
            trainer.world,
            trainer.backbone,
            prompts,
            steering,
            sampler=trainer.config.sampler,
            gold=list(JUDGES),
        )
        verdict = f"obeys {_mean(stats, STRICT):.1%} (gold {_mean(stats, GOLD):.1%})"
        phase.note = f"{verdict} at {stats.evaluations.per_image:.1f} forwards per image"
    return images, stats


def _mean(stats: SteeringStats, score: str) -> float:
    return float(stats.gold[score].mean())


def _remaining_cost(log: PhaseLog) -> float:
    """Seconds that the phases after training take: those before it once more, a margin, and the report."""
    return 1.15 * (log.seconds["evaluation"] + log.seconds["steering"]) + REPORT_SECONDS


def _require_identical_samples(trainer: LatentActorCriticTrainer, loaded: Backbone) -> None:
    prompts = trainer.held_out.cycle(RELOAD_SAMPLES)
    rollouts = [
        RolloutSampler(backbone, backbone.critic, GraphRunner()).sample(
            trainer.table,
            prompts.texts,
            prompts.metadata,
            NoiseKey.create(trainer.config.seed, range(RELOAD_SAMPLES), trainer.device),
            guidance_scale=trainer.config.sampler.guidance_scale,
            keep_features=False,
        )
        for backbone in (trainer.backbone, loaded)
    ]
    trained, again = rollouts
    same = torch.equal(trained.latents, again.latents) and torch.equal(trained.values, again.values)
    assert same, "the saved model does not sample what the trained one does"


def _versions() -> dict[str, str]:
    packages = ("lacfast", "torch", "diffusers", "numpy")
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}
