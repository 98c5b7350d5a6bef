"""Strong scaling: the same iteration of the recipe `shapes` by more processes, one thread each, in turn.

    python -m bench.scaling                               1 and 2 processes, five rounds, to the screen
    python -m bench.scaling --processes 1 4 --rounds 3
    python -m bench.scaling --apart                       one process that samples beside one that learns
    python -m bench.scaling --paper                       a table of the recipes on many GPUs, nothing is run

A round runs each number of processes once; a speed-up is the median over the rounds of the ratio within a
round, in seconds of wall time, so the machine should have an idle core for every process.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from typing import Any

import torch

from bench import machine
from bench.matched_loops import brightness, tiny_match
from lacfast.distributed import joined
from lacfast.runs.plan import TINY_MODELS, plan
from lacfast.runs.recipes import recipe, recipes
from lacfast.trainer import LatentActorCriticTrainer

BATCH = 192
"""Of the preset."""
STALENESS = 1
"""Of the ranks apart: the least with which both work at a time."""
GPUS = (8, 16, 32, 64, 128, 256, 512, 1024)
"""Columns of the table."""
ITERATIONS = 3
"""Timed ones of a process group, behind those that warm up."""
WARM_UP = 2
"""The second is the first one whose rollout may have been made while the one before was learned from."""


@dataclass(frozen=True)
class Iteration:
    """What one takes, in seconds: medians over those of a process group."""

    seconds: float
    waited: float = 0.0
    """Of these the ranks that learn waited for a rollout."""
    samplers_waited: float = 0.0
    """The ranks that sample for an order."""

    @property
    def overlap(self) -> float:
        """Seconds in which both worked, as a share of the iteration."""
        return max(1 - (self.waited + self.samplers_waited) / self.seconds, 0.0)


def iteration(rollout_ranks: int = 0) -> Iteration | None:
    """An iteration of this process group, on the first rank; None on the others."""
    torch.set_num_threads(1)
    with joined() as world:
        match = tiny_match("dit", batches=8, num_steps=8)
        preset = recipe("shapes").train
        config = replace(
            preset,
            batch_size=BATCH,
            rollout_ranks=rollout_ranks,
            staleness=STALENESS if rollout_ranks else 0,
            ppo=replace(preset.ppo, microbatch_size=32, minibatch_draw="stratified"),
        )
        trainer = LatentActorCriticTrainer(
            match.build(torch.float32), brightness, list(match.prompts), config
        )
        ends, metrics = [], []

        def note(found: dict[str, Any]) -> None:
            ends.append(time.perf_counter())
            metrics.append(found)

        trainer.train(WARM_UP + ITERATIONS, on_iteration=note)
        trainer.close()
        if not world.is_first:
            return None
        seconds = [after - before for before, after in pairwise(ends)][-ITERATIONS:]
        waited, samplers_waited = (
            statistics.median(found.get(f"seconds_{who}_waited", 0.0) for found in metrics[-ITERATIONS:])
            for who in ("learners", "rollout_ranks")
        )
        return Iteration(statistics.median(seconds), waited, samplers_waited)


def measured(processes: int, rollout_ranks: int = 0) -> Iteration:
    """`iteration` of so many processes."""
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes), "-m"]
    command = [sys.executable, *launcher, "bench.scaling", "--rank", str(rollout_ranks)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return Iteration(**json.loads(done.stdout.splitlines()[-1]))


def apart(rounds: int) -> dict[str, float]:
    """One process that samples while one learns, beside two that do both in turn; medians over the rounds."""
    found = [(measured(2), measured(2, rollout_ranks=1)) for _ in range(rounds)]
    shown = {
        "seconds of two that do both": [both.seconds for both, _ in found],
        "seconds of two apart": [one.seconds for _, one in found],
        "speed-up": [both.seconds / one.seconds for both, one in found],
        "overlap": [one.overlap for _, one in found],
        "seconds that the one that learns waits": [one.waited for _, one in found],
        "seconds that the one that samples waits": [one.samplers_waited for _, one in found],
    }
    return {name: round(statistics.median(values), 3) for name, values in shown.items()}


def paper() -> str:
    """The recipes of published models on GPUS, by lacfast.runs.scaling, as Markdown."""
    head = " | ".join(f"{gpus:,} GPUs" for gpus in GPUS)
    lines = [f"| | batch | sent per GPU | {head} |", "|---|" + "---|" * (2 + len(GPUS))]
    for name, planned_recipe in recipes().items():
        config = planned_recipe.settings
        if config.model in TINY_MODELS:
            continue
        planned, batch = plan(config, ranks=config.train.shard), config.train.batch_size
        found = [planned.on(gpus) if gpus <= batch else None for gpus in GPUS]
        sent = max(each.gradient_bytes + each.gathered_bytes for each in found if each is not None)
        cells = ["" if each is None else f"{each.efficiency:.1%}" for each in found]
        lines.append(f"| `{name}` | {batch:,} | {sent / 1e9:.1f} GB | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2], help="the first is the baseline")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--paper", action="store_true", help="print the table")
    parser.add_argument("--apart", action="store_true", help="ranks that sample beside ranks that learn")
    parser.add_argument("--rank", type=int, help="one process of a round, by the launcher, and rollout ranks")
    options = parser.parse_args(arguments)
    if options.paper:
        print(paper())
        return
    if options.rank is not None:
        found = iteration(options.rank)
        if found is not None:
            print(json.dumps(asdict(found)))
        return
    processor = machine.label(torch.device("cpu"))
    if options.apart:
        print(json.dumps({"processor": processor, **apart(options.rounds)}, indent=2))
        return
    rounds = [{count: measured(count).seconds for count in options.processes} for _ in range(options.rounds)]
    first = options.processes[0]
    speed_ups = {
        count: statistics.median(each[first] / each[count] for each in rounds) for count in options.processes
    }
    print(json.dumps({"processor": processor, "speed-up": speed_ups}, indent=2))


if __name__ == "__main__":
    main()
