"""Learning curves: each claim about the algorithm as one resumable command.

    python -m bench.learning baselines                     tune, run and judge all arms, DiT and UNet
    python -m bench.learning baselines --backbone dit --minutes 20
    python -m bench.learning --page                        docs/results.md from what has been run

Runs are kept one by one under bench/results/learning, so a command that is stopped goes on where it was. A
second process may run beside the first: each takes runs that no other has begun.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from bench.learning import page, runs, units
from bench.learning.analysis import area, images
from bench.learning.claims import CLAIMS, Claim
from bench.learning.problems import PROBLEMS, Materials
from bench.learning.runs import Arm, Budget
from lacfast.tasks.models import BackboneName

RESULTS = Path(__file__).resolve().parents[1] / "results" / "learning"
TUNING_SEED = 1_000
"""Of the runs that choose settings; no reported run has it."""
TUNING_SHARE = 0.5
"""Of the budget in images that a tuning run gets."""


def folder(claim: str, backbone: str) -> Path:
    return RESULTS / claim / backbone


def file_name(arm: str, rest: str) -> str:
    return f"{arm.lower().replace(' ', '-')}-{rest}.json"


def at_rate(arm: Arm, rate: float) -> Arm:
    """The arm with another learning rate of the policy."""
    return replace(arm, config=replace(arm.config, ppo=replace(arm.config.ppo, policy_learning_rate=rate)))


def chosen(claim: Claim, directory: Path, name: str) -> float | None:
    """The value of the grid with the largest area under the headline's curve; None: not tuned yet."""
    if len(claim.grid) == 1:
        return claim.grid[0]
    areas = {}
    for value in claim.grid:
        path = directory / "tuning" / file_name(name, f"{value:g}")
        if not path.exists():
            return None
        points = runs.read(path)
        areas[value] = area(points, images, claim.metrics[0], images(points[-1]))
    return max(areas, key=lambda value: areas[value])


@dataclass(frozen=True)
class Job:
    """One run that is wanted."""

    path: Path
    """Of its curve."""
    arm: Arm
    budget: Budget
    seed: int
    tuning: bool


def jobs(claim: Claim, directory: Path, backbone: BackboneName) -> Iterator[Job]:
    """Every run of a claim: first those that tune, then seed by seed those whose arm is tuned."""
    arms, budget = claim.arms(backbone), claim.budgets[backbone]
    if len(claim.grid) > 1:
        short = replace(budget, images=round(TUNING_SHARE * budget.images), seconds=0.0)
        for name, arm in arms.items():
            for value in claim.grid:
                path = directory / "tuning" / file_name(name, f"{value:g}")
                yield Job(path, at_rate(arm, value), short, TUNING_SEED, True)
    for seed in range(claim.seeds):
        for name, arm in arms.items():
            value = chosen(claim, directory, name)
            if value is not None:
                path = directory / file_name(name, f"seed{seed}")
                yield Job(path, at_rate(arm, value), budget, seed, False)


def perform(name: str, backbone: BackboneName, materials: Materials, deadline: float) -> None:
    """Run what is missing of a claim, beginning nothing after the deadline."""
    claim = CLAIMS[name]
    for job in jobs(claim, folder(name, backbone), backbone):
        if time.monotonic() > deadline:
            return
        if job.path.exists() or not units.begin(job.path):
            continue
        try:
            points = runs.run(
                PROBLEMS[claim.problem],
                backbone,
                job.arm,
                job.budget,
                materials,
                seed=job.seed,
                tuning=job.tuning,
            )
            rate = job.arm.config.ppo.policy_learning_rate
            runs.write(
                job.path, points, claim=name, backbone=backbone, seed=job.seed, policy_learning_rate=rate
            )
        finally:
            units.mark(job.path).unlink()
        first, last = (point.scores[claim.metrics[0]] for point in (points[0], points[-1]))
        print(f"{job.path.relative_to(RESULTS)}: {claim.metrics[0]} {first:.3f} -> {last:.3f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("claims", nargs="*", choices=[*CLAIMS, []], help="default: all")
    parser.add_argument("--backbone", choices=("dit", "unet"), help="default: those of the claim")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no run after these")
    parser.add_argument("--materials", type=Path, default=Path("runs/learning"), help="base models")
    parser.add_argument("--page", action="store_true", help="only write docs/results.md")
    arguments = parser.parse_args()
    deadline = time.monotonic() + 60 * arguments.minutes
    if not arguments.page:
        for name in arguments.claims or CLAIMS:
            for backbone in CLAIMS[name].budgets:
                if arguments.backbone in (None, backbone):
                    perform(name, backbone, Materials(arguments.materials), deadline)
    page.write(RESULTS)


if __name__ == "__main__":
    main()
