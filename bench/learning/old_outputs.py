"""What the old policy's forwards at states that are not trained took of a run's seconds.

    python -m bench.learning.old_outputs

A loss on the forward process without a critic compares with the old policy at the pairs that it trains. Runs
that were recorded before 2026-11-28 had it run on every state. This measures what that took of an iteration,
and notes in each of those runs the factor that makes its seconds those of today: `runs.curve` applies it.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

from bench.learning import claim_arms, runs, tables, units
from bench.learning.claims import CLAIMS
from bench.learning.problems import PROBLEMS, Materials
from bench.learning.runs import Arm
from lacfast.config import ForwardProcess
from lacfast.learning.pairs import all_states, states_of
from lacfast.policy import guided_output
from lacfast.records import Rollout
from lacfast.rollout.renoising import RenoisingSampler
from lacfast.tasks.models import BackboneName
from lacfast.trainer import LatentActorCriticTrainer

BACKBONES: tuple[BackboneName, ...] = ("dit", "unet")
ARM, PROBLEM = "DiffusionNFT", "shapes"
STUDY, KEY = "old-outputs", "measured"
RESULTS = Path(__file__).resolve().parents[1] / "results" / "learning"
TOLD = """Seconds of losses on the forward process without a critic are those measured times {factors}: when
they were run the old policy ran on states that were not trained, too (`bench.learning.old_outputs`)."""


def is_concerned(arm: Arm) -> bool:
    """Whether an arm's old policy runs on trained pairs alone today."""
    return isinstance(arm.config.objective, ForwardProcess) and arm.config.critic.trunk == "none"


def measure(backbone: BackboneName, materials: Materials, *, repeats: int) -> dict[str, Any]:
    """Median CPU seconds of an iteration as it is and as it was, by turns in one process, and their ratio."""
    arm = claim_arms.forward_process(backbone)[ARM]
    trainer = runs.trainer_of(PROBLEMS[PROBLEM], backbone, arm, materials, seed=0)
    trainer.train_iteration()
    seconds: dict[str, list[float]] = {"iteration": [], "at_every_state": []}
    for _ in range(repeats):
        for name, context in (("iteration", nullcontext()), ("at_every_state", _everywhere(trainer))):
            with context:
                start = time.process_time()
                trainer.train_iteration()
                seconds[name].append(time.process_time() - start)
    found = {name: median(each) for name, each in seconds.items()}
    return found | {"repeats": repeats, "factor": round(found["iteration"] / found["at_every_state"], 3)}


@contextmanager
def _everywhere(trainer: LatentActorCriticTrainer) -> Iterator[None]:
    """Within the context the old policy runs on every state of a rollout, and the update runs it no more."""
    sampler, update = trainer.rollout_sampler, trainer.learner.policy_update
    assert isinstance(sampler, RenoisingSampler)
    assert update.old is not None, f"without a critic the update of {ARM} runs the old policy"
    own, old = sampler._renoised, update.old

    def renoised(chain: Rollout, guidance_scale: float, **options: Any) -> Rollout:
        made = own(chain, guidance_scale, **options)
        timesteps = made.table.timesteps.float()
        with torch.no_grad():
            for pairs in all_states(made).split(made.batch_size):
                states = states_of(made, timesteps, pairs)
                output, _ = guided_output(trainer.backbone, states, None, guidance_scale, "cond")
                made.model_outputs[pairs.steps, pairs.rows] = output
        return made

    sampler._renoised, update.old = renoised, None  # type: ignore[method-assign]
    try:
        yield
    finally:
        sampler._renoised, update.old = own, old  # type: ignore[method-assign]


def note(results: Path, backbone: BackboneName, factor: float) -> int:
    """Write the factor into the runs that have none; returns how many there were."""
    noted = 0
    for name, claim in CLAIMS.items():
        if backbone not in claim.budgets:
            continue
        study = results / name / backbone
        starts = tuple(
            f"{tables.key_start(arm)}seed" for arm, made in claim.arms(backbone).items() if is_concerned(made)
        )
        for key, unit in units.load(study).items():
            if key.startswith(starts) and "seconds_factor" not in unit:
                units.write(study, key, unit | {"seconds_factor": factor})
                noted += 1
    return noted


def told(results: Path) -> str:
    """What a page of results says of it; empty where nothing was measured."""
    found = {backbone: units.load(results / STUDY / backbone).get(KEY) for backbone in BACKBONES}
    if not all(found.values()):
        return ""
    factors = " and ".join(f"{unit['factor']:.2f} ({name})" for name, unit in found.items() if unit)
    return TOLD.format(factors=factors)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--materials", type=Path, default=Path("runs/learning"), help="base models")
    parser.add_argument("--repeats", type=int, default=20)
    options = parser.parse_args()
    for backbone in BACKBONES:
        found = units.done(RESULTS / STUDY / backbone, KEY, partial(_measured, backbone, options))
        assert found is not None, "nobody else measures"
        print(f"{backbone}: {found}, noted in {note(RESULTS, backbone, found['factor'])} runs")


def _measured(backbone: BackboneName, options: argparse.Namespace) -> units.Unit:
    return measure(backbone, Materials(options.materials), repeats=options.repeats)


if __name__ == "__main__":
    main()
