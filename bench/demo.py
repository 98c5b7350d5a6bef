"""The demo for several seeds, by the processor's clock.

python -m bench.demo runs/demos      runs those seeds that are not there yet
python -m bench.report runs/demos    records them under docs/demo, with the picture of the first

A demo ends when its budget of seconds is spent, so that a busy machine makes it learn less. Here a second is
one of the first process's processor, on one thread: what else runs changes no figure, nor does a wait for the
other process, which does as much.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from lacfast.runs.demo import run_demo

SEEDS = (0, 1, 2)
PROCESSES = 2
"""What `lacfast demo` starts."""


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.demo")
    parser.add_argument("out", type=Path, help="folder of the runs, one for each seed")
    parser.add_argument("--seed", type=int, action="append", help="one of SEEDS, or another; may be repeated")
    options = parser.parse_args(arguments)
    # All that measures seconds in this process: phases, the budget and the trainer's end.
    time.perf_counter = time.process_time
    for seed in options.seed or SEEDS:
        out = options.out / f"seed-{seed}"
        if not (out / "summary.json").exists():
            run_demo(out, seed=seed, processes=PROCESSES)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
