"""Two threads beside one on the largest shapes of each op that shares its work, after equal bits.

python -m bench.threads      prints the table

Wall time, so it means something on two idle cores only. Inputs below a million elements stay on one thread.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from bench import machine
from bench.interleaved import race, speed_ups
from bench.shapes import LATENTS, POOLS, Case, LatentCase, PoolCase
from bench.workloads import WORKLOADS
from bench.workloads.workload import OURS, OURS_DRAWN, Call, Inputs, WrongResultError

CPU = torch.device("cpu")
OPS = ("normal_noise", "gaussian_step", "step_log_prob", "ppo_loss", "value_pool")
LARGEST: dict[type[Case], Case] = {LatentCase: LATENTS[-1], PoolCase: POOLS[-1]}


def with_threads(count: int, call: Call, inputs: Inputs) -> tuple[torch.Tensor, ...]:
    """The results of a call that may use `count` threads."""
    torch.set_num_threads(count)
    return call(inputs)


def measure(
    cases: dict[type[Case], Case], *, rounds: int, ops: tuple[str, ...] = OPS
) -> list[dict[str, Any]]:
    """A row per op, dtype and kind of noise.

    Raises:
        WrongResultError: two threads give other bits than one.
    """
    rows = []
    for op in ops:
        for dtype in WORKLOADS[op].dtypes:
            case = cases[WORKLOADS[op].kind]
            workload = WORKLOADS[op].build(case, dtype, CPU, compiled=False)
            for provider in (OURS, OURS_DRAWN):
                if provider not in workload.providers:
                    continue
                calls: dict[str, Callable[[], tuple[torch.Tensor, ...]]] = {
                    str(count): partial(with_threads, count, workload.providers[provider], workload.inputs)
                    for count in (1, 2)
                }
                try:
                    one, two = (call() for call in calls.values())
                    if not all(torch.equal(*pair) for pair in zip(one, two, strict=True)):
                        raise WrongResultError(f"{workload.title()}: two threads give other bits than one")
                    seconds = race(dict(calls), rounds=rounds, warmup=2, clock=time.perf_counter)
                finally:
                    torch.set_num_threads(1)
                rows.append(
                    {
                        "op": op,
                        "provider": provider,
                        "case": str(case),
                        "dtype": str(dtype).removeprefix("torch."),
                        "milliseconds": {n: 1e3 * statistics.median(times) for n, times in seconds.items()},
                        "speed_up": speed_ups(seconds, "1")["2"],
                    }
                )
    return rows


def table(result: dict[str, Any]) -> str:
    """The times, as Markdown."""
    lines = ["| op | dtype | one thread, ms | two | |", "|---|---|---|---|---|"]
    for row in result["rows"]:
        one, two = (row["milliseconds"][count] for count in ("1", "2"))
        name = f"`{row['op']}`" + row["provider"].removeprefix(OURS)
        lines.append(f"| {name} | {row['dtype']} | {one:.2f} | {two:.2f} | {row['speed_up']:.2f}x |")
    note = (
        f"Wall time of {result['label']}, two cores, torch {result['torch']}, {result['date']}: medians of "
        f"interleaved rounds after equal bits. Latents are {LARGEST[LatentCase]}; features "
        f"{LARGEST[PoolCase]}. `python -m bench.threads` measures it."
    )
    return "\n".join([*lines, "", note])


def main() -> None:
    result = {
        "rows": measure(LARGEST, rounds=15),
        "label": machine.label(CPU),
        "torch": torch.__version__,
        "date": machine.today(),
    }
    print(table(result))


if __name__ == "__main__":
    main()
