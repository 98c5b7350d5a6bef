"""The kernel table: every op, shape and dtype, ours beside the reference and the peers' formulas.

    OMP_NUM_THREADS=1 python -m bench.kernels                      writes bench/results/kernels-cpu-DATE.json
    OMP_NUM_THREADS=1 python -m bench.kernels --avx2               kernels-avx2-DATE.json: AVX2 at most
    python -m bench.kernels --cases claim --ops gaussian_step      some of it, to the screen only
    python -m bench.kernels --device cuda --out PATH               CUDA graphs, cold and hot L2
    python -m bench.kernels --device cuda --out PATH --seconds 480 --resume    a part, after earlier parts

Results are compared before they are timed. On a CPU: one thread, providers in turn, medians, ratios within a
round. Bandwidth is that of the fused op's bytes (bench/roofline.py), whoever runs it. On a GPU all cases are
joined by those that exceed its L2 cache, and times stand beside that of an empty node of a graph.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench import machine, roofline, shapes
from bench.graph_timing import cold_and_hot, empty_node_seconds
from bench.interleaved import affordable_rounds, race, speed_ups
from bench.workloads import WORKLOADS
from bench.workloads.workload import Workload

RESULTS = Path(__file__).parent / "results"
AVX2 = {
    "ATEN_CPU_CAPABILITY": "avx2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    "TORCHINDUCTOR_CPP_MARCH": "x86-64-v3",
    "LACFAST_INSTRUCTION_SET": "x86-64-v3",
}
"""The environment that holds torch, its libraries, its compiler and lacfast to AVX2; each reads it once."""
Row = dict[str, Any]
Measure = Callable[[Workload], dict[str, Row]]
"""Workload -> provider -> seconds, speed_up and what else was measured; or provider -> {"error": why}."""


def measure_cpu(workload: Workload, *, budget: float) -> dict[str, Row]:
    """Interleaved medians of one thread within about `budget` seconds."""
    calls = {name: partial(call, workload.inputs) for name, call in workload.providers.items()}
    rounds = affordable_rounds(calls, budget)
    seconds = race(calls, rounds=rounds)
    return {
        name: {
            "seconds": statistics.median(times),
            "speed_up": speed_ups(seconds, workload.baseline_of(name))[name],
            "rounds": rounds,
        }
        for name, times in seconds.items()
    }


def measure_cuda(workload: Workload, *, empty_node: float) -> dict[str, Row]:
    """Cold times, hot ones beside them, and these in times of an empty node."""
    times = cold_and_hot(workload)
    rows: dict[str, Row] = {}
    for name, measured in times.items():
        if isinstance(measured, str):
            rows[name] = {"error": measured}
            continue
        cold, hot = measured
        rows[name] = {"seconds": cold, "hot_microseconds": hot * 1e6, "empty_nodes": hot / empty_node}
        base = times[workload.baseline_of(name)]
        if not isinstance(base, str):
            rows[name]["speed_up"] = base[0] / cold
    return rows


def rows_of(workload: Workload, measured: dict[str, Row], copy_bandwidth: float) -> list[Row]:
    """The rows of a workload: microseconds, bandwidth, its share of a copy's; or why there are none."""
    rows = []
    absent = {name: {"error": reason} for name, reason in workload.absent.items()}
    for provider, values in (measured | absent).items():
        row: Row = {
            "op": workload.op,
            "case": str(workload.case),
            "dtype": str(workload.dtype).removeprefix("torch."),
            "provider": provider,
            "baseline": workload.baseline_of(provider),
        }
        row |= {name: value for name, value in values.items() if name != "seconds"}
        if "seconds" in values:
            bandwidth = workload.costs[provider].gigabytes_per_second(values["seconds"])
            row |= {
                "microseconds": values["seconds"] * 1e6,
                "gigabytes_per_second": bandwidth,
                "percent_of_copy": 100 * bandwidth * 1e9 / copy_bandwidth,
            }
        rows.append(row)
    return rows


def table(rows: list[Row]) -> str:
    """Rows of one workload for the screen."""
    first = rows[0]
    lines = [f"{first['op']}, {first['case']}, {first['dtype']}"]
    for row in rows:
        if "error" in row:
            lines.append(f"  {row['provider']:<26} {row['error']}")
            continue
        speed_up = f"{row['speed_up']:6.2f}x" if "speed_up" in row else ""
        hot = f"  hot {row['hot_microseconds']:.1f} us" if "hot_microseconds" in row else ""
        hot += f", {row['empty_nodes']:.1f} empty nodes" if "empty_nodes" in row else ""
        lines.append(
            f"  {row['provider']:<26} {row['microseconds']:10.1f} us {speed_up} "
            f"{row['gigabytes_per_second']:8.1f} GB/s {row['percent_of_copy']:6.1f} % of copy{hot}"
        )
    return "\n".join(lines)


def workloads(
    names: list[str], selection: str, device: torch.device, *, compiled: bool
) -> Iterator[tuple[str, Callable[[], Workload]]]:
    """Title and builder of every workload asked for; building is what costs memory."""
    for name in names:
        entry = WORKLOADS[name]
        for case in shapes.select(entry.kind, selection):
            for dtype in entry.dtypes:
                build = partial(entry.build, case, dtype, device, compiled=compiled)
                yield title_of({"op": name, "case": case, "dtype": str(dtype).removeprefix("torch.")}), build


def collect(
    planned: list[tuple[str, Callable[[], Workload]]],
    measure: Measure,
    copy_bandwidth: float,
    *,
    seconds: float,
    on_rows: Callable[[list[Row]], None],
    clock: Callable[[], float] = time.monotonic,
) -> dict[str, str]:
    """Measure what fits `seconds`; returns title -> why it has no row.

    A workload that fails, or whose results differ, leaves its reason and the next one goes on.
    """
    start, missing = clock(), {}
    for title, build in planned:
        if clock() - start > seconds:
            missing[title] = f"not started within {seconds:g} s"
            continue
        # Compiled code of earlier shapes counts towards torch's limit of recompilations.
        torch.compiler.reset()
        try:
            workload = build().checked()
            on_rows(rows_of(workload, measure(workload), copy_bandwidth))
        except Exception as error:
            missing[title] = f"{type(error).__name__}: {error}"
    return missing


def title_of(row: Row) -> str:
    """Which workload a row belongs to."""
    return f"{row['op']}, {row['case']}, {row['dtype']}"


def another_run(earlier: dict[str, Any], now: dict[str, Any]) -> str:
    """What keeps the rows of two runs from standing in one table; empty where nothing does."""
    for name in ("device", "machine", "max_autotune"):
        if earlier.get(name) != now[name]:
            return name
    return ""


def refusal(options: argparse.Namespace) -> str:
    """Why the options cannot be followed here; empty where they can."""
    on_gpu = options.device == "cuda"
    if options.max_autotune and (not on_gpu or options.no_compile):
        return "--max-autotune tunes what is compiled for a GPU: add --device cuda, leave out --no-compile"
    if options.cases == "beyond-cache" and not on_gpu:
        return "--cases beyond-cache holds a GPU's L2 cache to account: add --device cuda"
    if options.resume and (options.out is None or not options.out.exists()):
        return f"--resume goes on with a file: pass an existing --out, not {options.out}"
    if on_gpu and not torch.cuda.is_available():
        return "--device cuda needs a CUDA device; --device cpu runs anywhere"
    return ""


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(prog="python -m bench.kernels", description=__doc__.split("\n")[0])
    options.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    options.add_argument("--cases", choices=shapes.SELECTIONS, default="all")
    options.add_argument("--ops", nargs="+", choices=WORKLOADS, default=list(WORKLOADS), metavar="OP")
    options.add_argument("--avx2", action="store_true", help="hold torch and lacfast to AVX2, CPU")
    options.add_argument("--no-compile", action="store_true", help="leave torch.compile out: quick")
    options.add_argument("--max-autotune", action="store_true", help="compiled opponents are tuned, CUDA")
    options.add_argument("--seconds", type=float, default=3600.0, help="start no workload after this")
    options.add_argument("--resume", action="store_true", help="keep the rows of --out, measure the others")
    options.add_argument("--budget", type=float, default=4.0, help="seconds of timing per workload, CPU")
    options.add_argument("--out", type=Path, help="JSON; by default only a run of all cases and ops is kept")
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    if options.avx2 and not AVX2.items() <= os.environ.items():
        command = [sys.executable, "-m", "bench.kernels", *(sys.argv[1:] if arguments is None else arguments)]
        return subprocess.run(command, env=os.environ | AVX2, check=False).returncode
    device = torch.device(options.device)
    if reason := refusal(options):
        print(f"kernels: {reason}", file=sys.stderr)
        return 2
    out = options.out
    if out is None and options.cases == "all" and options.ops == list(WORKLOADS):
        kind = "avx2" if options.avx2 else device.type
        out = RESULTS / f"kernels-{kind}-{machine.today()}.json"
    torch.set_num_threads(1)
    bandwidth = roofline.copy_bandwidth(device)
    result: dict[str, Any] = {
        "date": machine.today(),
        "device": device.type,
        "machine": machine.describe(device),
        "copy_gigabytes_per_second": bandwidth / 1e9,
        "max_autotune": options.max_autotune,
        "rows": [],
        "missing": {},
    }
    if options.resume:
        earlier = json.loads(out.read_text(encoding="utf-8"))
        if difference := another_run(earlier, result):
            print(
                f"kernels: {out} has another {difference}; measure it anew without --resume", file=sys.stderr
            )
            return 2
        result["rows"] = earlier["rows"]
    if device.type == "cuda":
        torch._inductor.config.max_autotune = options.max_autotune
        result["empty_node_microseconds"] = empty_node_seconds() * 1e6

    def keep(rows: list[Row]) -> None:
        print(table(rows), flush=True)
        result["rows"] += rows
        if out is not None:
            out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")

    selections = [options.cases]
    if device.type == "cuda" and options.cases == "all":
        selections.append("beyond-cache")
    done = {title_of(row) for row in result["rows"]}
    planned = [
        (title, build)
        for selection in selections
        for title, build in workloads(options.ops, selection, device, compiled=not options.no_compile)
        if title not in done
    ]
    measure = partial(measure_cpu, budget=options.budget)
    if device.type == "cuda":
        measure = partial(measure_cuda, empty_node=result["empty_node_microseconds"] / 1e6)
    result["missing"] = collect(planned, measure, bandwidth, seconds=options.seconds, on_rows=keep)
    keep_missing = json.dumps(result, indent=1) + "\n"
    if out is not None:
        out.write_text(keep_missing, encoding="utf-8")
    for title, reason in result["missing"].items():
        print(f"missing: {title}: {reason}", file=sys.stderr)
    return 1 if result["missing"] else 0


if __name__ == "__main__":
    sys.exit(main())
