"""Runs a few training iterations, or one op, for a profiler; docs/profiling.md has the recipes.

    python -m bench.profile training                       torch.profiler: table by span, Chrome trace
    python -m bench.profile op ppo_loss --device cuda
    nsys profile -t cuda,nvtx ... python -m bench.profile training --device cuda --tool nsight

With --tool nsight only the part after warm-up lies between cudaProfilerStart and cudaProfilerStop.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from bench import shapes
from bench.workloads import WORKLOADS
from bench.workloads.workload import OURS
from lacfast.runtime.profiling import DOMAIN, recorded_by_torch

TRACE = "trace.json"


def training(device: torch.device, backbone: str) -> Callable[[], object]:
    """One training iteration of a tiny untrained model at the demo's settings."""
    from bench.learning.study_config import study_config
    from lacfast import LatentActorCriticTrainer
    from lacfast.backbones import adapt_pretrained
    from lacfast.tasks.pretraining import pretrain
    from lacfast.tasks.shapes import train_prompts

    adapted = adapt_pretrained(pretrain(backbone, steps=1))
    for module in (adapted.model, adapted.prompt_encoder, adapted.codec):
        module.to(device)
    trainer = LatentActorCriticTrainer(adapted, "shapes", train_prompts(), study_config(backbone))
    return trainer.train_iteration


def op(device: torch.device, name: str, cases: str) -> Callable[[], object]:
    """Ours, once for every dtype of the op at the chosen sizes."""
    entry = WORKLOADS[name]
    built = [
        entry.build(case, dtype, device, compiled=False)
        for case in shapes.select(entry.kind, cases)
        for dtype in entry.dtypes
    ]
    return lambda: [workload.providers[OURS](workload.inputs) for workload in built]


@contextmanager
def nsight(device: torch.device) -> Iterator[None]:
    """The range that Nsight captures with --capture-range=cudaProfilerApi."""
    torch.cuda.synchronize(device)
    with torch.cuda.profiler.profile():
        yield
        torch.cuda.synchronize(device)


@contextmanager
def torch_profiler(device: torch.device, out: Path) -> Iterator[None]:
    """Spans and operators by time; writes OUT/trace.json for chrome://tracing or Perfetto."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profile, recorded_by_torch():
        yield
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    out.mkdir(parents=True, exist_ok=True)
    profile.export_chrome_trace(str(out / TRACE))
    order = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    print(spans_table(profile, on_device=device.type == "cuda"))
    print(profile.key_averages().table(sort_by=order, row_limit=20, max_name_column_width=40))
    print(f"trace: {out / TRACE}")


def spans_table(profile: torch.profiler.profile, *, on_device: bool) -> str:
    """One line per span: how often, and the time in it."""
    events = [event for event in profile.key_averages() if event.key.startswith(f"{DOMAIN}/")]
    # On a GPU torch lists a span twice, as the host's and as the device's.
    merged: dict[str, tuple[int, float, float]] = {}
    for event in events:
        count, host, device = merged.get(event.key, (0, 0.0, 0.0))
        merged[event.key] = (
            max(count, event.count),
            host + event.cpu_time_total,
            max(device, event.device_time_total),
        )
    lines = [f"{'span':<28}{'count':>7}{'host ms':>11}" + (f"{'device ms':>12}" if on_device else "")]
    for name, (count, host, device) in sorted(merged.items(), key=lambda item: -item[1][1]):
        line = f"{name:<28}{count:>7}{host / 1e3:>11.2f}"
        lines.append(line + (f"{device / 1e3:>12.2f}" if on_device else ""))
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(prog="python -m bench.profile", description=__doc__.split("\n")[0])
    options.add_argument("what", choices=("training", "op"))
    options.add_argument(
        "name", nargs="?", default="gaussian_step", help="op: one of " + ", ".join(WORKLOADS)
    )
    options.add_argument("--backbone", choices=("dit", "unet"), default="dit")
    options.add_argument("--cases", choices=shapes.SELECTIONS, default="claim")
    options.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    options.add_argument("--tool", choices=("torch", "nsight"), default="torch")
    options.add_argument("--iterations", type=int, default=2)
    options.add_argument("--warmup", type=int, default=2)
    options.add_argument("--out", type=Path, default=Path("runs/profile"))
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    device = torch.device(options.device)
    if options.name not in WORKLOADS:
        print(f"profile: unknown op {options.name!r}; known: {', '.join(WORKLOADS)}", file=sys.stderr)
        return 2
    if options.tool == "nsight" and options.device != "cuda":
        print("profile: Nsight sees CUDA only; use --device cuda, or --tool torch on a CPU", file=sys.stderr)
        return 2
    if options.tool == "nsight" and importlib.util.find_spec("nvtx") is None:
        print("profile: Nsight sees no range without nvtx; pip install 'lacfast[profile]'", file=sys.stderr)
        return 2
    work = (
        training(device, options.backbone)
        if options.what == "training"
        else op(device, options.name, options.cases)
    )
    for _ in range(options.warmup):
        work()
    with nsight(device) if options.tool == "nsight" else torch_profiler(device, options.out):
        for _ in range(options.iterations):
            work()
    return 0


if __name__ == "__main__":
    sys.exit(main())
