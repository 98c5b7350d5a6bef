"""Times every launch candidate of the Triton kernels on this GPU and writes kernels/launches.json.

    python -m bench.tune                          all ops
    python -m bench.tune --ops gaussian_step --seconds 480 --out tuned.json
    python -m bench.tune --seconds 480 --out tuned.json --resume      the next part: what the file lacks

A launch may depend on one latent's size only, never on the batch or the dtype (the order of its sums must
not), so a candidate's score is the geometric mean over both. An op that runs out of time keeps its table, and
the sizes that were timed stay in the file.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from bench import machine
from bench.graph_timing import cold_and_hot, graph_seconds
from bench.shapes import LatentCase
from bench.workloads import WORKLOADS
from bench.workloads.workload import OURS, OURS_DRAWN, Workload
from lacfast.kernels import launch

Candidate = tuple[int, int, int]
Score = Callable[[str, int, Candidate], float]
"""(op, elements, candidate) -> a time in any unit; infinite where it does not run."""
BUCKETS = (512, 4096, 16384, 65536, 262144, 2**31)
"""Largest size of each row: the demo's latents, SD1.5's, SD3.5-M's and FLUX's at 512 and 1024 pixels."""
LARGEST_TIMED = 2**20
"""Stands for the open last bucket."""
BATCHES = (1, 8)
MARGIN = 0.02
"""A candidate replaces the table's launch if it is faster by this share: less is noise."""
CALLS = 50


def choose(scores: dict[Candidate, float], current: Candidate) -> Candidate:
    """The fastest candidate, or the current one where none beats it by MARGIN.

    Raises:
        ValueError: when no candidate runs.
    """
    best = min(scores, key=lambda candidate: scores[candidate])
    if math.isinf(scores[best]):
        raise ValueError("no candidate runs: every time is infinite; look at the errors above")
    incumbent = scores.get(current, math.inf)
    return current if incumbent <= scores[best] * (1 + MARGIN) else best


def tune(
    op: str,
    score: Score,
    *,
    buckets: tuple[int, ...] = BUCKETS,
    known: dict[int, Candidate] | None = None,
    expired: Callable[[], bool] = lambda: False,
    on_chosen: Callable[[], None] = lambda: None,
) -> list[launch.Launch] | None:
    """Measured rows for one op, neighbours of one launch merged; None when the time ran out first.

    Args:
        op: a table of launches.
        score: the timer.
        buckets: largest size of each row.
        known: bucket -> what an earlier part chose; what this one chooses is added.
        expired: whether to stop.
        on_chosen: called when `known` has one more.
    """
    known = {} if known is None else known
    for limit in buckets:
        if limit in known:
            continue
        elements = min(limit, LARGEST_TIMED)
        current = current_launch(op, elements)
        scores = {}
        for candidate in dict.fromkeys([current, *launch.candidates(op)]):
            if expired():
                return None
            scores[candidate] = score(op, elements, candidate)
        known[limit] = choose(scores, current)
        on_chosen()
    rows: list[launch.Launch] = []
    for limit in buckets:
        if rows and rows[-1].shape == known[limit]:
            rows.pop()
        rows.append(launch.Launch(limit, *known[limit], measured=True))
    return rows


def current_launch(op: str, elements: int) -> Candidate:
    """What this device would launch now."""
    architecture = launch.architecture_of(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    block, blocks, num_warps, _ = launch.pick_launch(op, elements, architecture)
    return block, blocks, num_warps


@contextmanager
def forced(op: str, architecture: str, candidate: Candidate) -> Iterator[None]:
    """Within the context every size of `op` is launched as `candidate`; the file is not touched."""
    table = launch.table(op)
    saved = table.get(architecture)
    table[architecture] = [launch.Launch(2**31, *candidate)]
    launch.pick_launch.cache_clear()
    try:
        yield
    finally:
        if saved is None:
            del table[architecture]
        else:
            table[architecture] = saved
        launch.pick_launch.cache_clear()


def workload_of(op: str) -> str:
    """The workload that runs the kernel of a table: a backward kernel runs behind its forward one."""
    return op.removesuffix("_backward")


def tunable() -> list[str]:
    """Tables whose size is one latent's; others (value_pool) have a workload with sizes of its own."""
    return [
        op
        for op in launch.names()
        if workload_of(op) in WORKLOADS and WORKLOADS[workload_of(op)].kind is LatentCase
    ]


def only_ours(workload: Workload) -> Workload:
    """Without the competitors, and with the noise as training has it: drawn."""
    name = OURS_DRAWN if OURS_DRAWN in workload.providers else OURS
    return replace(workload, providers={name: workload.providers[name]}, baseline=name)


def gpu_score(device: torch.device) -> Score:
    """Geometric mean of cold times over BATCHES and dtypes."""
    architecture = launch.architecture_of(device)
    built: dict[tuple[str, int], list[Workload]] = {}

    def workloads(op: str, elements: int) -> list[Workload]:
        key = workload_of(op), elements
        if key not in built:
            entry = WORKLOADS[key[0]]
            # One size at a time: the copies are large.
            built.clear()
            built[key] = [
                only_ours(
                    entry.build(LatentCase("tuning", batch, (elements,)), dtype, device, compiled=False)
                )
                for batch in BATCHES
                for dtype in entry.dtypes
            ]
        return built[key]

    def timed(call: Any, copies: Any) -> float:
        return graph_seconds(call, copies, calls=CALLS, replays=3)

    def score(op: str, elements: int, candidate: Candidate) -> float:
        times = []
        for workload in workloads(op, elements):
            with forced(op, architecture, candidate):
                (result,) = cold_and_hot(workload, seconds=timed).values()
            if isinstance(result, str):
                print(f"  {op} {elements} {candidate}: {result}", file=sys.stderr)
                return math.inf
            times.append(result[0])
        return statistics.geometric_mean(times)

    return score


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(prog="python -m bench.tune", description=__doc__.split("\n")[0])
    options.add_argument("--ops", nargs="+", choices=tunable(), default=tunable(), metavar="OP")
    options.add_argument(
        "--seconds", type=float, default=3600.0, help="stop after this; finished ops are kept"
    )
    options.add_argument("--table", type=Path, default=launch.LAUNCHES, help="the launch table to change")
    options.add_argument("--out", type=Path, help="JSON of what was found")
    options.add_argument("--resume", action="store_true", help="go on with what --out has")
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    if options.resume and (options.out is None or not options.out.exists()):
        print(
            f"tune: --resume goes on with a file: pass an existing --out, not {options.out}", file=sys.stderr
        )
        return 2
    if not torch.cuda.is_available():
        print("tune: launches are measured on a CUDA device; there is none here", file=sys.stderr)
        return 2
    device = torch.device("cuda")
    architecture, start = launch.architecture_of(device), time.monotonic()
    found: dict[str, Any] = {
        "architecture": architecture,
        "machine": machine.label(device),
        "rows": {},
        "chosen": {},
    }
    if options.resume:
        earlier = json.loads(options.out.read_text(encoding="utf-8"))
        for name in ("architecture", "machine"):
            if earlier[name] != found[name]:
                print(f"tune: {options.out} has another {name}; tune anew without --resume", file=sys.stderr)
                return 2
        found |= earlier

    def keep() -> None:
        if options.out is not None:
            options.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")

    unfinished = []
    for op in options.ops:
        known = {int(limit): tuple(shape) for limit, shape in found["chosen"].get(op, {}).items()}

        def on_chosen(op: str = op, known: dict[int, Candidate] = known) -> None:
            found["chosen"][op] = known
            keep()

        rows = tune(
            op,
            gpu_score(device),
            known=known,
            expired=lambda: time.monotonic() - start > options.seconds,
            on_chosen=on_chosen,
        )
        if rows is None:
            unfinished.append(op)
            continue
        launch.write(op, architecture, rows, options.table)
        found["rows"][op] = [row._asdict() for row in rows]
        for row in rows:
            print(f"{op:<26} up to {row.elements:>10}: {row.blocks} x {row.block}, {row.num_warps} warps")
        keep()
    if unfinished:
        print(
            f"tune: not finished within {options.seconds:g} s: {', '.join(unfinished)}; --resume goes on",
            file=sys.stderr,
        )
    return 1 if unfinished else 0


if __name__ == "__main__":
    sys.exit(main())
