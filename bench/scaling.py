"""Strong scaling: the same iteration of the preset `shapes` by more processes, one thread each, in turn.

    python -m bench.scaling                               1 and 2 processes, five rounds, to the screen
    python -m bench.scaling --processes 1 4 --rounds 3
    python -m bench.scaling --paper                       a table of the presets on many GPUs, nothing is run

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
from dataclasses import replace

import torch

from bench import machine
from bench.matched_loops import brightness, tiny_match
from lacfast.distributed import joined
from lacfast.runs.plan import TINY_MODELS, plan
from lacfast.runs.presets import RUNS
from lacfast.runs.scaling import scaling
from lacfast.trainer import LatentActorCriticTrainer

BATCH = 192
"""Of the preset."""
GPUS = (8, 16, 32, 64)
"""Columns of the table."""
ITERATIONS = 3
"""Timed ones of a process group, behind one that warms up."""


def seconds_per_iteration() -> float | None:
    """Median over the iterations of this process group, on the first rank; None on the others."""
    torch.set_num_threads(1)
    with joined() as world:
        match = tiny_match("dit", batches=8, num_steps=8)
        preset = RUNS["shapes"]().train
        config = replace(
            preset,
            batch_size=BATCH,
            ppo=replace(preset.ppo, microbatch_size=32, minibatch_draw="stratified"),
        )
        trainer = LatentActorCriticTrainer(
            match.build(torch.float32), brightness, list(match.prompts), config
        )
        trainer.train_iteration()
        seconds = []
        for _ in range(ITERATIONS):
            world.wait("the start")
            start = time.perf_counter()
            trainer.train_iteration()
            seconds.append(time.perf_counter() - start)
        return statistics.median(seconds) if world.is_first else None


def measured(processes: int) -> float:
    """`seconds_per_iteration` of so many processes."""
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes), "-m"]
    command = [sys.executable, *launcher, "bench.scaling", "--rank"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout.splitlines()[-1])


def paper() -> str:
    """The presets of published models on GPUS, by lacfast.runs.scaling, as Markdown."""
    head = " | ".join(f"{gpus} GPUs" for gpus in GPUS)
    lines = [f"| | batch | gradients sent per GPU | {head} |", "|---|" + "---|" * (2 + len(GPUS))]
    for name, preset in RUNS.items():
        config = preset()
        if config.model in TINY_MODELS:
            continue
        costs, batch = plan(config).costs, config.train.batch_size
        found = [scaling(costs, config.train, gpus) if gpus <= batch else None for gpus in GPUS]
        sent = max(each.gradient_bytes for each in found if each is not None)
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
    parser.add_argument("--rank", action="store_true", help="one process of a round, by the launcher")
    options = parser.parse_args(arguments)
    if options.paper:
        print(paper())
        return
    if options.rank:
        seconds = seconds_per_iteration()
        if seconds is not None:
            print(seconds)
        return
    rounds = [{count: measured(count) for count in options.processes} for _ in range(options.rounds)]
    first = options.processes[0]
    speed_ups = {
        count: statistics.median(each[first] / each[count] for each in rounds) for count in options.processes
    }
    print(json.dumps({"processor": machine.label(torch.device("cpu")), "speed-up": speed_ups}, indent=2))


if __name__ == "__main__":
    main()
