"""Strong scaling: the same iteration of the recipe `shapes` by more processes, one thread each, in turn.

    python -m bench.scaling                               1 and 2 processes, five rounds
    python -m bench.scaling --processes 1 4 --rounds 3
    python -m bench.scaling --apart                       one process that samples beside one that learns
    python -m bench.scaling --paper                       the recipes on many GPUs: counted, nothing is run

Each is written to bench/results/scaling.json, from which `python -m bench.report` writes docs/distributed.md.

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
from pathlib import Path
from typing import Any

import torch

from bench import machine
from bench.matched_loops import brightness, tiny_match
from lacfast.distributed import joined
from lacfast.runs.config import RunConfig
from lacfast.runs.plan import plan
from lacfast.runs.recipes import recipe
from lacfast.trainer import LatentActorCriticTrainer

RESULT = Path(__file__).parent / "results" / "scaling.json"
BATCH = 192
"""Of the recipe."""
STALENESS = 1
"""Of the ranks apart: the least with which both work at a time."""
ON_PAPER = (
    *("sd15-ddpo", "sd35m-geneval", "flux-pickscore", "flow-grpo-geneval"),
    *("dance-grpo-hpsv2", "dance-grpo-hpsv2-lora", "ddpo-compressibility"),
)
"""Recipes of the table: what they send differs, by method, critic or kind of weights."""
GPUS = (8, 16, 32, 64, 128, 256, 512, 1024)
"""Columns of the table."""
ROUNDS = 5
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
        preset = recipe("shapes-ppo").train
        config = replace(
            preset,
            batch_size=BATCH,
            eval_every=0,
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


def strong(processes: Sequence[int], rounds: int) -> dict[str, float]:
    """How often as fast as the first number of processes each is; medians of the ratios within rounds."""
    found = [{count: measured(count).seconds for count in processes} for _ in range(rounds)]
    first = processes[0]
    return {
        str(count): round(statistics.median(each[first] / each[count] for each in found), 3)
        for count in processes
    }


def on_paper(config: RunConfig) -> dict[str, Any]:
    """A recipe on GPUS, by lacfast.runs.scaling: efficiencies where its batch has an image for each."""
    planned, batch = plan(config, ranks=config.train.shard), config.train.batch_size
    found = {gpus: planned.on(gpus) for gpus in GPUS if gpus <= batch}
    sent = max(each.gradient_bytes + each.gathered_bytes for each in found.values())
    return {
        "batch": batch,
        "gigabytes": round(sent / 1e9, 1),
        "efficiency": {str(gpus): round(each.efficiency, 3) for gpus, each in found.items()},
    }


def paper() -> dict[str, Any]:
    """The recipes of the table, `on_paper`."""
    return {name: on_paper(recipe(name)) for name in ON_PAPER}


def paper_table(recorded: dict[str, Any]) -> str:
    """What `paper` found, as Markdown."""
    head = " | ".join(f"{gpus:,} GPUs" for gpus in GPUS)
    lines = [f"| | batch | sent per GPU | {head} |", "|---|---|---|" + "---|" * len(GPUS)]
    for name, row in recorded["paper"].items():
        efficiencies = (row["efficiency"].get(str(gpus)) for gpus in GPUS)
        cells = ["" if each is None else f"{each:.1%}" for each in efficiencies]
        lines.append(f"| `{name}` | {row['batch']:,} | {row['gigabytes']:.1f} GB | {' | '.join(cells)} |")
    return "\n".join(lines)


def strong_text(recorded: dict[str, Any]) -> str:
    """What `strong` found, in a sentence."""
    result = recorded["strong"]
    first, *others = result["speed-up"]
    faster = " and ".join(f"{count} are {result['speed-up'][count]:.2f}" for count in others)
    return (
        "An iteration of `shapes` by processes of one thread on a CPU, with gloo: "
        f"{faster} times as fast as {first} ({result['processor']}, {result['date']}, medians of "
        f"{result['rounds']} rounds in turn of `python -m bench.scaling`)."
    )


def apart_text(recorded: dict[str, Any]) -> str:
    """What `apart` found, in sentences."""
    result = recorded["apart"]
    found = result["found"]
    return (
        f"A process that samples beside one that learns: both work at a time for {found['overlap']:.0%} of "
        f"an iteration. It takes {found['seconds of two apart']:.2f} s, of which the one that learns waits "
        f"{found['seconds that the one that learns waits']:.2f} s and the one that samples "
        f"{found['seconds that the one that samples waits']:.2f} s; two that do both in turn take "
        f"{found['seconds of two that do both']:.2f} s ({result['processor']}, {result['date']}, `shapes` "
        f"with staleness {STALENESS}, medians of {result['rounds']} rounds in turn of "
        "`python -m bench.scaling --apart`)."
    )


def record(**found: Any) -> dict[str, Any]:
    """Keep what was found beside what was found before; returns all."""
    known = json.loads(RESULT.read_text(encoding="utf-8")) if RESULT.exists() else {}
    RESULT.write_text(json.dumps(known | found, indent=2) + "\n", encoding="utf-8")
    return known | found


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    kinds = parser.add_mutually_exclusive_group()
    kinds.add_argument("--processes", type=int, nargs="+", default=[1, 2], help="the first is the baseline")
    kinds.add_argument("--paper", action="store_true", help="count the recipes on many GPUs")
    kinds.add_argument("--apart", action="store_true", help="ranks that sample beside ranks that learn")
    kinds.add_argument("--rank", type=int, help="one process of a round, by the launcher, and rollout ranks")
    parser.add_argument("--rounds", type=int, help=f"{ROUNDS} by default")
    options = parser.parse_args(arguments)
    if len(options.processes) < 2:
        parser.error("--processes takes the baseline and at least one other number")
    if options.rounds is not None and (options.paper or options.rank is not None):
        parser.error("--rounds would be ignored: nothing is timed in rounds")
    rounds = ROUNDS if options.rounds is None else options.rounds
    if rounds < 1:
        parser.error(f"--rounds {rounds} measures nothing; take 1 or more")
    if options.rank is not None:
        found = iteration(options.rank)
        if found is not None:
            print(json.dumps(asdict(found)))
        return
    if options.paper:
        print(paper_table(record(paper=paper())))
        return
    how = {"processor": machine.label(torch.device("cpu")), "date": machine.today(), "rounds": rounds}
    if options.apart:
        print(apart_text(record(apart=how | {"found": apart(rounds)})))
    else:
        print(strong_text(record(strong=how | {"speed-up": strong(options.processes, rounds)})))


if __name__ == "__main__":
    main()
