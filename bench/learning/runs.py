"""One run of one arm: train for a budget, judge along the way, keep the curve as JSON.

Time is the process's CPU time on one thread, without the judging, so that a busy machine changes no curve; on
a GPU it is that of the clock. A reward that would cost c seconds per image adds c times the images; see
analysis.along. A run that is stopped in the middle leaves its state and goes on from there.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from bench.learning.choosing import CANDIDATES, Choice, choose
from bench.learning.more_compute import measured
from bench.learning.problems import Materials, Problem, Prompts, gauges
from lacfast.config import ForwardProcess, TrainConfig
from lacfast.records import Evaluation
from lacfast.runtime.directories import whole_directory
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
    """Whether a critic is pretrained before the first update."""
    counts_pretraining: bool = True
    """Whether that costs images and time; False only for a control."""
    choice: Choice | None = None
    """How the critic chooses what is scored, for a control; None: all of a rollout is."""


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
    sampled: dict[str, dict[str, float]] = field(default_factory=dict)
    """What the end of a run makes of more compute, see more_compute.measured; empty where it is not asked."""


class _Stopwatch:
    """Seconds of this process while it runs: of the CPU, or by the clock where a GPU works."""

    def __init__(self, device: torch.device) -> None:
        self.seconds = 0.0
        self._is_gpu = device.type == "cuda"

    def __enter__(self) -> None:
        self._start = self._now()

    def __exit__(self, *error: object) -> None:
        self.seconds += self._now() - self._start

    def _now(self) -> float:
        if self._is_gpu:
            torch.cuda.synchronize()
            return time.perf_counter()
        return time.process_time()


def run(
    problem: Problem,
    backbone: BackboneName,
    arm: Arm,
    budget: Budget,
    materials: Materials,
    *,
    seed: int,
    tuning: bool = False,
    more_compute: bool = False,
    deadline: float = math.inf,
    unfinished: Path | None = None,
) -> list[Point] | None:
    """The curve of one arm, None when the deadline came first.

    Args:
        problem: task, rewards and judges.
        backbone: base model, the same for every seed.
        arm: the method.
        budget: when to judge and to stop.
        materials: where base models and encoders are kept.
        seed: of the run.
        tuning: judge on the prompts that choose settings, and not on those that are reported.
        more_compute: judge the end by what it makes of more compute per image, too.
        deadline: by time.monotonic(); looked at between iterations.
        unfinished: folder that keeps the state at the deadline, and that a run goes on from. None: a run that
            has begun runs to its end.
    """
    if materials.device == "cpu":
        torch.set_num_threads(1)
    trainer = trainer_of(problem, backbone, arm, materials, seed=seed, tuning=tuning, samples=budget.samples)
    measure, watch = gauges(materials, problem.task), _Stopwatch(trainer.device)

    def judge() -> Point:
        evaluation = trainer.evaluate()
        scores = evaluation.means() | measure(evaluation) | _explained(evaluation)
        return Point(trainer.images, _forwards(trainer, arm), watch.seconds, scores)

    if unfinished is not None and unfinished.exists():
        points, watch.seconds = _restored(trainer, unfinished)
    else:
        points = [judge()]
        if trainer.critic is not None and arm.value_pretraining:
            with watch:
                trainer.pretrain_critic()
            if not arm.counts_pretraining:
                trainer.images, watch.seconds = 0, 0.0
            points.append(judge())
    # A run that was stopped on its way to a judgement is judged, though it has had its budget.
    while (
        trainer.images < budget.images or watch.seconds < budget.seconds or trainer.images > points[-1].images
    ):
        due = _next_judgement(points, budget)
        while trainer.images < due:
            if unfinished is not None and time.monotonic() > deadline:
                _keep(trainer, points, watch.seconds, unfinished)
                return None
            with watch:
                trainer.train_iteration()
        points.append(judge())
    if more_compute:
        points[-1] = replace(points[-1], sampled=measured(trainer, budget.samples))
    if unfinished is not None:
        shutil.rmtree(unfinished, ignore_errors=True)
    return points


def trainer_of(
    problem: Problem,
    backbone: BackboneName,
    arm: Arm,
    materials: Materials,
    *,
    seed: int,
    tuning: bool = False,
    samples: int = Budget.samples,
) -> LatentActorCriticTrainer:
    """The trainer of a run, arguments as `run`'s; `samples` are images per judgement."""
    task, prompts = problem.task, Prompts.of(problem.task)
    weights = arm.rewards or problem.rewards
    trainer = LatentActorCriticTrainer(
        materials.backbone(task, backbone),
        {materials.reward(name, task): weight for name, weight in weights.items()},
        prompts.train,
        replace(arm.config, seed=seed, eval_samples=samples),
        held_out=prompts.tuning if tuning else prompts.held_out,
        evaluation_rewards=[materials.reward(name, task) for name in problem.judges if name not in weights],
    )
    if arm.choice is not None:
        choose(trainer, arm.choice)
    return trainer


def _next_judgement(points: Sequence[Point], budget: Budget) -> int:
    """Images at which the next judgement is due, whether or not the run has stopped since the last one."""
    return (points[-1].images // budget.judged_every + 1) * budget.judged_every


def _keep(trainer: LatentActorCriticTrainer, points: list[Point], seconds: float, target: Path) -> None:
    """The state of a run between two iterations."""
    with whole_directory(target) as made:
        trainer.save(made / "trainer")
        kept = described(points, seconds=seconds)
        (made / "curve.json").write_text(json.dumps(kept) + "\n", encoding="utf-8")


def _restored(trainer: LatentActorCriticTrainer, source: Path) -> tuple[list[Point], float]:
    """Load what `_keep` kept; returns the curve so far and its seconds."""
    trainer.load(source / "trainer")
    kept = json.loads((source / "curve.json").read_text(encoding="utf-8"))
    return curve(kept), float(kept["seconds"])


def _explained(evaluation: Evaluation) -> dict[str, float]:
    variance = evaluation.explained_variance
    return {} if variance.shape[-1] == 0 else {"explained_variance": float(variance.mean())}


def _forwards(trainer: LatentActorCriticTrainer, arm: Arm) -> int:
    config, table = trainer.config, trainer.tables.at(0)
    halves = 2 if config.sampler.guidance_scale > 1 else 1
    trained, sampling, per_pair = table.trainable_steps, table.num_steps, 3 + (config.ppo.kl is not None)
    if isinstance(config.objective, ForwardProcess):
        trained = config.objective.forward_steps(table.num_steps)
        # The old policy runs on the pairs that are trained, with a critic on every state.
        sampling, per_pair = (sampling, per_pair + 1) if trainer.critic is None else (2 * sampling, per_pair)
    sampling *= 1 if arm.choice is None else CANDIDATES
    pairs = config.ppo.timestep_fraction * len(trained) * config.batch_size
    updates = trainer.iteration * config.ppo.num_inner_epochs * pairs * per_pair
    return round(halves * (trainer.images * sampling + updates))


def described(points: Sequence[Point], **description: Any) -> dict[str, Any]:
    """A curve as a unit of a study."""
    return {**description, "seconds_factor": 1.0, "points": [asdict(point) for point in points]}


def curve(unit: dict[str, Any]) -> list[Point]:
    """The curve of a unit, its seconds as the code of today would have them, see old_outputs."""
    factor = unit.get("seconds_factor", 1.0)
    points = [Point(**point) for point in unit["points"]]
    return [replace(point, seconds=factor * point.seconds) for point in points]
