"""Learning curves: each claim about the algorithm as one resumable command.

    python -m bench.learning baselines                     tune, run and judge all arms, DiT and UNet
    python -m bench.learning baselines --backbone dit --minutes 20
    python -m bench.learning joint --arms "two heads" "checker alone"
    python -m bench.learning --page                        docs/results.md from what has been run
    python -m bench.learning --scale gpu --device cuda     64x64 pictures, larger models, twice the seeds

Runs are kept under bench/results/learning (--out), a file per claim and backbone, so a command that is
stopped goes on where it was; one that --minutes stops goes on in the middle of a run. A second process may
run beside the first: each takes runs that no other has begun. The scale "gpu" has a folder and a page of its
own.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from bench.learning import page, runs, tables, units
from bench.learning.analysis import area, images
from bench.learning.claims import CLAIMS, Claim
from bench.learning.problems import PROBLEMS, Materials
from bench.learning.runs import Arm, Budget
from bench.learning.scales import SCALES, Scale
from bench.learning.tuning import Setting
from lacfast.tasks.models import BackboneName

RESULTS = Path(__file__).resolve().parents[1] / "results" / "learning"
"""Folder of the scale "cpu"; the others append their name."""
TUNING_SEED = 1_000
"""Seed of the runs that choose settings; no reported run has it."""


@dataclass(frozen=True)
class Job:
    """One run that is wanted."""

    key: str
    """Key of its curve in the study."""
    arm: Arm
    budget: Budget
    seed: int
    tuning: bool


def tried(claim: Claim, study: Path, name: str, arm: Arm, number: int) -> list[Setting]:
    """The settings of an arm that a round of the tuning tries, and the chosen one alone after the last; empty
    while a round before has curves to come."""
    if number == 0:
        return claim.tuning.settings(arm)
    keys = claim.tuning.keys(tables.key_start(name), tried(claim, study, name, arm, number - 1), number - 1)
    found = units.load(study)
    if not keys.keys() <= found.keys():
        return []
    curves = {key: runs.curve(found[key]) for key in keys}
    headline = claim.metrics[0]
    areas = {key: area(points, images, headline, images(points[-1])) for key, points in curves.items()}
    best = sorted(keys, key=lambda key: -areas[key])
    return [keys[key] for key in best[: claim.tuning.survivors(len(best), number)]]


def jobs(claim: Claim, study: Path, backbone: BackboneName) -> Iterator[Job]:
    """Every run of a claim that no other has: first those that tune, then seed by seed those whose arm is
    tuned."""
    budget, tuning = claim.budgets[backbone], claim.tuning
    arms = {name: arm for name, arm in claim.arms(backbone).items() if name not in claim.runs_of}
    for number, share in enumerate(tuning.rounds):
        short = replace(budget, images=round(share * budget.images), seconds=0.0)
        for name, arm in arms.items():
            settings = tried(claim, study, name, arm, number)
            for key, setting in tuning.keys(tables.key_start(name), settings, number).items():
                yield Job(key, tuning.applied(arm, setting, short.images), short, TUNING_SEED, True)
    for seed in range(claim.seeds):
        for name, arm in arms.items():
            for setting in tried(claim, study, name, arm, len(tuning.rounds)):
                key = f"{tables.key_start(name)}seed{seed}"
                yield Job(key, tuning.applied(arm, setting, budget.images), budget, seed, False)


def perform(
    name: str,
    backbone: BackboneName,
    materials: Materials,
    deadline: float,
    *,
    results: Path = RESULTS,
    scale: Scale = SCALES["cpu"],
    arms: Collection[str] = (),
) -> None:
    """Run what is missing of a claim, beginning nothing after the deadline; a run in the middle is kept.

    Args:
        name: of the claim.
        backbone: base model.
        materials: base models, and the states of runs that have not ended.
        deadline: by time.monotonic().
        results: folder of the curves.
        scale: of the claim.
        arms: that run, of those that the claim has; empty: all.
    """
    claim, study = scale.claim(CLAIMS[name]), results / name / backbone
    own = claim.arms(backbone)
    chosen = replace(claim, arms=lambda _: {arm: own[arm] for arm in own if not arms or arm in arms})
    for job in jobs(chosen, study, backbone):
        if time.monotonic() > deadline:
            return
        with units.begun(study, job.key) as is_ours:
            if not is_ours or job.key in units.load(study):
                continue
            points = runs.run(
                scale.problem(PROBLEMS[claim.problem]),
                backbone,
                job.arm,
                job.budget,
                materials,
                seed=job.seed,
                tuning=job.tuning,
                more_compute=claim.more_compute and not job.tuning,
                deadline=deadline,
                unfinished=materials.folder / "unfinished" / name / backbone / job.key,
            )
            if points is None:
                return
            unit = runs.described(
                points,
                claim=name,
                backbone=backbone,
                seed=job.seed,
                policy_learning_rate=job.arm.config.ppo.policy_learning_rate,
                batch_size=job.arm.config.batch_size,
                rewards=job.arm.rewards or PROBLEMS[claim.problem].rewards,
                settings=units.changed(job.arm.config),
            )
            units.write(study, job.key, unit)
        first, last = (point.scores[claim.metrics[0]] for point in (points[0], points[-1]))
        print(f"{name}/{backbone}/{job.key}: {claim.metrics[0]} {first:.3f} -> {last:.3f}", flush=True)


def _arms(name: str) -> set[str]:
    """The arms of a claim on any of its backbones."""
    return {arm for backbone in CLAIMS[name].budgets for arm in CLAIMS[name].arms(backbone)}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("claims", nargs="*", choices=[*CLAIMS, []], help="default: all")
    parser.add_argument("--backbone", choices=("dit", "unet"), help="default: those of the claim")
    parser.add_argument("--arms", nargs="+", default=(), metavar="ARM", help="run these alone; default: all")
    parser.add_argument(
        "--minutes", type=float, default=float("inf"), help="stop after these, also within a run"
    )
    parser.add_argument("--materials", type=Path, default=Path("runs/learning"), help="base models")
    parser.add_argument("--scale", choices=tuple(SCALES), default="cpu", help="sizes and budgets")
    parser.add_argument("--device", default="cpu", help="of the models; times on a GPU are by the clock")
    parser.add_argument("--out", type=Path, help="folder of curves and page; default: bench/results and docs")
    parser.add_argument("--page", action="store_true", help="only write the page")
    options = parser.parse_args(arguments)
    deadline = time.monotonic() + 60 * options.minutes
    scale, suffix = SCALES[options.scale], "" if options.scale == "cpu" else f"-{options.scale}"
    results = options.out or RESULTS.with_name(RESULTS.name + suffix)
    known = {arm for name in options.claims or CLAIMS for arm in _arms(name)}
    if unknown := sorted(set(options.arms) - known):
        parser.error(f"no such arm: {', '.join(unknown)}; these claims have {', '.join(sorted(known))}")
    if not options.page:
        materials = scale.materials(options.materials, options.device)
        for name in options.claims or CLAIMS:
            for backbone in CLAIMS[name].budgets:
                if options.backbone in (None, backbone):
                    perform(
                        name, backbone, materials, deadline, results=results, scale=scale, arms=options.arms
                    )
    docs = options.out or page.DOCS
    page.write(results, docs / f"results{suffix}.md", scale)


if __name__ == "__main__":
    main()
