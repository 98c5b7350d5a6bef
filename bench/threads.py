"""Two threads beside one on the largest shapes of each op that shares its work, after equal bits.

python -m bench.threads                    writes bench/results/threads-MAKER.json, which `bench.report` shows
python -m bench.threads --ops value_pool   some of it, to the screen only

Beside an op stands what a second thread brings its kernel without the op's own Python and autograd, which no
thread shares, and torch's copy of as many bytes: what only moves memory can gain no more, what computes up to
2x. It is wall time, in which a thread waits milliseconds for a core
that another program has: where a product of matrices does not gain from a second thread, nothing is measured.
Inputs below a million elements stay on one thread.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from bench import machine
from bench.interleaved import race, speed_ups
from bench.shapes import LATENTS, POOLS, Case, LatentCase, PoolCase
from bench.workloads import WORKLOADS
from bench.workloads.workload import OURS, OURS_DRAWN, Call, Inputs, WrongResultError
from lacfast.ops import op

RESULTS = Path(__file__).parent / "results"
CPU = torch.device("cpu")
OPS = ("normal_noise", "gaussian_step", "step_log_prob", "ppo_loss", "value_pool")
IDLE = 1.7
"""What a product of matrices gains at least from a second thread where both cores are idle."""
REST = 0.05
"""Seconds after which torch's own threads, which wait for work in a loop, have left their core."""
LARGEST: dict[type[Case], Case] = {LatentCase: LATENTS[-1], PoolCase: POOLS[-1]}


def with_threads(count: int, call: Call, inputs: Inputs) -> tuple[torch.Tensor, ...]:
    """The results of a call that may use `count` threads."""
    torch.set_num_threads(count)
    return call(inputs)


def gain(call: Call, inputs: Inputs, *, rounds: int) -> tuple[dict[str, list[float]], float]:
    """Seconds of every round with one thread and with two, and the speed-up."""
    calls = {str(count): partial(with_threads, count, call, inputs) for count in (1, 2)}
    time.sleep(REST)
    try:
        seconds = race(dict(calls), rounds=rounds, warmup=2, clock=time.perf_counter)
    finally:
        torch.set_num_threads(1)
    return seconds, speed_ups(seconds, "1")["2"]


def kernel_gain(call: Call, inputs: Inputs, *, rounds: int) -> float:
    """Speed-up of the kernels that a call of an op launches, on the records of that call."""
    kernels: list[Callable[[], None]] = []
    launch = op.launch

    def recorded(*arguments: Any) -> None:
        kernels.append(partial(launch, *arguments))
        launch(*arguments)

    with patch.object(op, "launch", recorded):
        call(inputs)

    def alone(_: Inputs) -> tuple[torch.Tensor, ...]:
        for kernel in kernels:
            kernel()
        return ()

    return gain(alone, inputs, rounds=rounds)[1]


def copy_gain(num_bytes: int, *, rounds: int) -> float:
    """Speed-up of torch's copy that reads and writes so many bytes together."""
    source = torch.ones(num_bytes // 8)
    inputs = {"source": source, "target": torch.zeros_like(source)}
    return gain(lambda given: (given["target"].copy_(given["source"]),), inputs, rounds=rounds)[1]


def product_gain(*, rounds: int) -> float:
    """Speed-up of a product of matrices, which only computes."""
    inputs = {"one": torch.ones(768, 768), "other": torch.ones(768, 768)}
    return gain(lambda given: (torch.mm(given["one"], given["other"]),), inputs, rounds=rounds)[1]


def measure(
    cases: dict[type[Case], Case], *, rounds: int, ops: tuple[str, ...] = OPS
) -> list[dict[str, Any]]:
    """A row per op, dtype and kind of noise.

    Raises:
        WrongResultError: two threads give other bits than one.
    """
    rows = []
    for name in ops:
        for dtype in WORKLOADS[name].dtypes:
            case = cases[WORKLOADS[name].kind]
            workload = WORKLOADS[name].build(case, dtype, CPU, compiled=False)
            for provider in (OURS, OURS_DRAWN):
                if provider not in workload.providers:
                    continue
                call = workload.providers[provider]
                try:
                    one, two = (with_threads(count, call, workload.inputs) for count in (1, 2))
                finally:
                    torch.set_num_threads(1)
                if not all(torch.equal(*pair) for pair in zip(one, two, strict=True)):
                    raise WrongResultError(f"{workload.title()}: two threads give other bits than one")
                seconds, speed_up = gain(call, workload.inputs, rounds=rounds)
                rows.append(
                    {
                        "op": name,
                        "provider": provider,
                        "case": str(case),
                        "dtype": str(dtype).removeprefix("torch."),
                        "milliseconds": {n: 1e3 * statistics.median(times) for n, times in seconds.items()},
                        "speed_up": speed_up,
                        "kernel_speed_up": kernel_gain(call, workload.inputs, rounds=rounds),
                        "copy_speed_up": copy_gain(workload.costs[provider].bytes, rounds=rounds),
                    }
                )
    return rows


def table(result: dict[str, Any]) -> str:
    """The times, as Markdown."""
    lines = ["| op | dtype | one thread, ms | two | | its kernel | a copy |", "|---" * 7 + "|"]
    for row in result["rows"]:
        one, two = (row["milliseconds"][count] for count in ("1", "2"))
        name = f"`{row['op']}`" + row["provider"].removeprefix(OURS)
        gains = " | ".join(
            f"{row[name]:.2f}x" if name in row else ""
            for name in ("speed_up", "kernel_speed_up", "copy_speed_up")
        )
        lines.append(f"| {name} | {row['dtype']} | {one:.2f} | {two:.2f} | {gains} |")
    processor = result["machine"]["processor"]
    note = (
        f"Wall time of {result['machine']['label']}, two cores, torch "
        f"{result['machine']['versions']['torch']}, lacfast with {processor['instruction set (lacfast)']}, "
        f"{result['date']}: medians of interleaved rounds after equal bits. Beside it what a second thread "
        "brings the kernel alone, without the op's Python and autograd, where that was measured, and torch's "
        "copy of as many bytes; it brings a product of matrices "
        f"{result['product_speed_up']:.2f}x. Latents are {LARGEST[LatentCase]}; features "
        f"{LARGEST[PoolCase]}. `python -m bench.threads` measures it."
    )
    return "\n".join([*lines, "", note])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.threads", description=__doc__.split("\n")[0])
    parser.add_argument("--ops", nargs="+", choices=OPS, default=list(OPS), metavar="OP")
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args(arguments)
    idle = product_gain(rounds=options.rounds)
    if idle < IDLE:
        print(
            f"threads: a product of matrices gains {idle:.2f}x from a second thread, on two idle cores at "
            f"least {IDLE:g}x; wait until nothing else runs",
            file=sys.stderr,
        )
        return 1
    result = {
        "date": machine.today(),
        "machine": machine.describe(CPU),
        "product_speed_up": idle,
        "rows": measure(LARGEST, rounds=options.rounds, ops=tuple(options.ops)),
    }
    if options.ops == list(OPS):
        path = RESULTS / f"threads-{machine.maker()}.json"
        path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(table(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
