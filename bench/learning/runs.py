"""One run of one arm: train for a budget, judge along the way, keep the curve as JSON.

Time is the process's CPU time on one thread, without the judging, so that a busy machine changes no curve. A
reward that would cost c seconds per image adds c times the images; see analysis.along.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from bench.learning import units
from bench.learning.problems import Materials, Problem, Prompts, gauges
from lacfast.config import TrainConfig
from lacfast.records import Evaluation
from lacfast.tasks.models import BackboneName
from lacfast.trainer import LatentActorCriticTrainer


@dataclass(frozen=True, kw_only=True)
class Arm:
    """A method: what the trainer is told."""

    config: TrainConfig
    """Its seed is the run's."""
    rewards: dict[str, float] | None = None
    """Reward -> weight. None: the problem's."""
    value_pretraining: bool = True
    """Whether a critic is pretrained before the first update; its images and its time count."""


@dataclass(frozen=True, kw_only=True)
class Budget:
    """A run ends when it has had all of both, so that arms can be compared along either."""

    images: int
    """Generated and scored, value pretraining included."""
    seconds: float
    """CPU time of rollouts, rewards and updates."""
    judged_every: int
    """Images between two judgements."""
    samples: int = 1024
    """Images per judgement."""


@dataclass(frozen=True)
class Point:
    """A judgement within a run."""

    images: int
    """Generated and scored for training so far."""
    forwards: int
    """Samples through the model so far: sampling once, an update's forward and backward three times."""
    seconds: float
    """CPU seconds so far, without judgements."""
    scores: dict[str, float]
    """Judges, rewards, gauges, and "explained_variance" of a critic."""


class _Stopwatch:
    """CPU seconds of this process while it runs."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __enter__(self) -> None:
        self._start = time.process_time()

    def __exit__(self, *error: object) -> None:
        self.seconds += time.process_time() - self._start


def run(
    problem: Problem,
    backbone: BackboneName,
    arm: Arm,
    budget: Budget,
    materials: Materials,
    *,
    seed: int,
    tuning: bool = False,
) -> list[Point]:
    """The curve of one arm.

    Args:
        problem: task, rewards and judges.
        backbone: base model, the same for every seed.
        arm: the method.
        budget: when to judge and to stop.
        materials: where base models and encoders are kept.
        seed: of the run.
        tuning: judge on the prompts that choose settings, and not on those that are reported.
    """
    torch.set_num_threads(1)
    task, prompts = problem.task, Prompts.of(problem.task)
    weights = arm.rewards or problem.rewards
    trainer = LatentActorCriticTrainer(
        materials.backbone(task, backbone),
        {materials.reward(name, task): weight for name, weight in weights.items()},
        prompts.train,
        replace(arm.config, seed=seed, eval_samples=budget.samples),
        held_out=prompts.tuning if tuning else prompts.held_out,
        evaluation_rewards=[materials.reward(name, task) for name in problem.judges if name not in weights],
    )
    measure, watch = gauges(materials, task), _Stopwatch()

    def judge() -> Point:
        evaluation = trainer.evaluate()
        scores = evaluation.means() | measure(evaluation) | _explained(evaluation)
        return Point(trainer.images, _forwards(trainer), watch.seconds, scores)

    points = [judge()]
    if trainer.critic is not None and arm.value_pretraining:
        with watch:
            trainer.pretrain_critic()
        points.append(judge())
    while trainer.images < budget.images or watch.seconds < budget.seconds:
        due = (trainer.images // budget.judged_every + 1) * budget.judged_every
        while trainer.images < due:
            with watch:
                trainer.train_iteration()
        points.append(judge())
    return points


def _explained(evaluation: Evaluation) -> dict[str, float]:
    variance = evaluation.explained_variance
    return {} if variance.shape[-1] == 0 else {"explained_variance": float(variance.mean())}


def _forwards(trainer: LatentActorCriticTrainer) -> int:
    config, table = trainer.config, trainer.tables.at(0)
    halves = 2 if config.sampler.guidance_scale > 1 else 1
    pairs = config.ppo.timestep_fraction * len(table.trainable_steps) * config.batch_size
    updates = trainer.iteration * config.ppo.num_inner_epochs * pairs * (3 + (config.ppo.kl_weight > 0))
    return round(halves * (trainer.images * table.num_steps + updates))


def write(path: Path, points: list[Point], **description: Any) -> None:
    """Keep a curve; a file that exists is a run that need not be repeated."""
    units.write(path, {**description, "points": [asdict(point) for point in points]})


def read(path: Path) -> list[Point]:
    """The curve of a finished run."""
    return [Point(**point) for point in units.read(path)["points"]]
