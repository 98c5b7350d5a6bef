"""What the terminal shows of a run: a line per phase, live where there is a terminal, and a closing table."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Column, Table

from lacfast.backbones.prompt_cache import DEFAULT_CAPACITY
from lacfast.config import to_json
from lacfast.distributed import World
from lacfast.records import Evaluation
from lacfast.report.demo import SCORES, score_rows
from lacfast.runs.apart import HOST_BYTES, Apart, apart
from lacfast.runs.capacity import GPU_BYTES, smaller_batches
from lacfast.runs.config import RunConfig
from lacfast.runs.plan import Plan
from lacfast.runs.scaling import LINK_BYTES, RANK_FLOPS, Scaling
from lacfast.steering import SteeringStats

QUIET_INTERVAL = 15.0
"""Seconds between lines of one phase where the output is no terminal."""


class Phase:
    """One phase in progress."""

    def __init__(self, title: str, console: Console, bar: Progress | None, task: TaskID | None) -> None:
        self.note = ""
        self._title = title
        self._console = console
        self._bar = bar
        self._task = task
        self._last_line = time.perf_counter()

    def update(self, fraction: float, note: str) -> None:
        """Show how much is done, 0 to 1, and what came of it."""
        self.note = note
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=min(max(fraction, 0.0), 1.0), note=note)
        elif time.perf_counter() - self._last_line >= QUIET_INTERVAL:
            self._last_line = time.perf_counter()
            self._console.print(f"  {self._title}: {note} ({fraction:.0%})", highlight=False, soft_wrap=True)

    def images(self, made: int, planned: int) -> None:
        """Show how many images are made."""
        self.update(made / planned, f"{made:,} of {planned:,} images")


class PhaseLog:
    """Runs phases, shows them, and keeps the seconds that each kind of work took."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console()
        self.seconds: dict[str, float] = {}
        self._start = time.perf_counter()

    @property
    def elapsed(self) -> float:
        """Seconds since the log was made."""
        return time.perf_counter() - self._start

    @contextmanager
    def phase(self, name: str, title: str) -> Iterator[Phase]:
        """A phase whose seconds are added to `seconds[name]`; phases of one kind share a name."""
        start = time.perf_counter()
        bar = self._bar() if self.console.is_terminal else None
        if bar is None:
            # At once: whoever reads a log wants to know what is being waited for.
            self.console.print(f"  {title} ...", highlight=False, soft_wrap=True)
            phase = Phase(title, self.console, None, None)
            yield phase
        else:
            with bar:
                phase = Phase(title, self.console, bar, bar.add_task(title, total=1.0, note=""))
                yield phase
        seconds = time.perf_counter() - start
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds
        self.console.print(
            f"[green]✓[/] {title:<32} {seconds:6.1f} s  {phase.note}", highlight=False, soft_wrap=True
        )

    def _bar(self) -> Progress:
        return Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", table_column=Column(no_wrap=True)),
            BarColumn(bar_width=10),
            TextColumn(
                "{task.fields[note]}", table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1)
            ),
            TimeRemainingColumn(compact=True, elapsed_when_finished=True),
            TextColumn("left"),
            console=self.console,
            transient=True,
            expand=True,
        )


def phase_log(world: World) -> PhaseLog:
    """The terminal of the first rank; the others show nothing."""
    return PhaseLog() if world.is_first else PhaseLog(Console(quiet=True))


def show_iteration(metrics: dict[str, Any]) -> None:
    """One line per iteration of `lacfast train`."""
    rewards = [f"{name} {value:.4f}" for name, value in metrics.items() if name.startswith("reward/")]
    seconds = metrics["seconds_rollout"] + metrics["seconds_update"]
    print(f"{metrics['iteration']:>5}  {'  '.join(rewards) or 'skipped'}  {seconds:.1f} s", flush=True)


def scores_line(evaluation: Evaluation) -> str:
    """The scores of an evaluation with their standard errors."""
    errors = evaluation.standard_errors()
    scores = (f"{name} {mean:.4f} ± {errors[name]:.4f}" for name, mean in evaluation.means().items())
    return f"{', '.join(scores)} of {len(evaluation.prompts):,}"


def show_scores(evaluation: Evaluation) -> None:
    """Mean and standard error of every score."""
    table = Table()
    for column in ("reward", "mean", "standard error", "images"):
        table.add_column(column, justify="left" if column == "reward" else "right")
    errors = evaluation.standard_errors()
    for name, mean in evaluation.means().items():
        table.add_row(name, f"{mean:.4f}", f"{errors[name]:.4f}", str(len(evaluation.prompts)))
    Console().print(table)


def show_steering(stats: SteeringStats, out: Path) -> None:
    """What steering cost and reached, and where the images are."""
    evaluations = stats.evaluations
    table = Table(show_header=False)
    table.add_column("")
    table.add_column("", justify="right")
    table.add_row("forwards per image, a backward is two", f"{evaluations.per_image:.1f}")
    table.add_row("forwards and backwards", f"{evaluations.forwards:,} and {evaluations.backwards:,}")
    table.add_row("reward calls for the choice", f"{stats.reward_calls:,}")
    if len(stats.values):
        table.add_row("V of the last noisy state", f"{float(stats.values[-1].mean()):.4f}")
    for name, scores in (stats.rewards | stats.gold).items():
        table.add_row(name, f"{float(scores.mean()):.4f}")
    console = Console()
    console.print(table)
    console.print(f"{evaluations.images} images in {out / 'images'}", highlight=False, soft_wrap=True)


def show_plan(config: RunConfig, plan: Plan, console: Console | None = None) -> None:
    """What an iteration costs, the memory of every phase, and the resolved settings behind it."""
    console, costs, memory = console or Console(), plan.costs, plan.memory
    console.print(
        _named(
            "One iteration",
            ("model", f"{costs.parameters / 1e6:,.1f} M parameters"),
            (
                "trained",
                f"{(costs.trained_parameters + costs.critic_parameters) / 1e6:,.1f} M with the critic",
            ),
            ("images and rewards", f"{costs.images:,}"),
            ("sampling", f"{costs.sampling_forwards:,} forwards, {costs.sampling_flops / 1e12:,.2f} TFLOP"),
            ("values of all steps", f"{costs.value_flops / 1e12:,.2f} TFLOP"),
            ("decoder", f"{costs.decode_flops / 1e12:,.2f} TFLOP"),
            ("policy update", f"{costs.update_pairs:,} pairs, {costs.update_flops / 1e12:,.2f} TFLOP"),
            ("critic update", f"{costs.critic_flops / 1e12:,.2f} TFLOP"),
        )
    )
    console.print(
        _named(
            "Memory",
            ("weights, decoder and text encoders", _size(memory.weight_bytes)),
            ("gradients, moments, average", _size(memory.training_bytes)),
            ("rollout", _size(memory.rollout_bytes)),
            (
                "prompts, on the host",
                f"{memory.prompt_bytes / 2**20:,.2f} MiB each, {_size(DEFAULT_CAPACITY)} at most",
            ),
        )
    )
    if config.train.rollout_ranks:
        console.print(_apart(apart(costs, config.train, config.gpus, memory.rollout_bytes)))
    elif config.planned_gpus > 1:
        console.print(_shared(plan.on(config.planned_gpus)))
    table = Table(title="Memory at its peak", title_justify="left", title_style="bold")
    table.add_column("")
    for column in ("device", "host"):
        table.add_column(column, justify="right")
    table.add_column("at a time")
    for phase in memory.phases:
        together = f"{phase.count} ({phase.setting})" if phase.setting else ""
        table.add_row(phase.name, _size(phase.device), _size(phase.host) if phase.host else "", together)
    table.add_section()
    host = _size(memory.host) if memory.host else ""
    table.add_row("peak", _size(memory.peak.device), host, memory.peak.name)
    console.print(table)
    for line in smaller_batches(memory, GPU_BYTES):
        console.print(f"On a GPU of 80 GB {line}.", highlight=False, soft_wrap=True)
    console.print(
        "Counted, not timed. Reward models, captured graphs and the allocator's reserve come on top."
    )
    console.print_json(json.dumps(to_json(config)))


def _shared(found: Scaling) -> Table:
    """An iteration on several GPUs."""
    gathered = []
    if found.gathers:
        sent = f"{found.gathers} times, {_size(round(found.gathered_bytes))} in all"
        gathered = [("weights sent where they are gathered", sent)]
    speeds = f"{RANK_FLOPS / 1e12:,.0f} TFLOP/s and {LINK_BYTES / 1e9:,.0f} GB/s per GPU, on paper"
    return _named(
        f"On {found.ranks} GPUs, each",
        ("work", f"{found.flops / 1e12:,.2f} TFLOP"),
        ("gradients sent", f"{found.optimizer_steps} times, {_size(round(found.gradient_bytes))} in all"),
        *gathered,
        (f"efficiency at {speeds}", f"{found.efficiency:.1%}"),
    )


def _apart(found: Apart) -> Table:
    """An iteration where ranks of their own sample."""
    speeds = f"{RANK_FLOPS / 1e12:,.0f} TFLOP/s per GPU and {HOST_BYTES / 1e9:,.0f} GB/s per host, on paper"
    order = "one after the other" if found.staleness == 0 else "at a time"
    return _named(
        f"{found.learners} GPUs learn and {found.rollout_ranks} sample, {order}",
        ("rollout sent by the rank that has most", _size(found.rollout_bytes)),
        ("weights sent to each that samples", _size(found.weight_bytes)),
        (f"waiting, at {speeds}", found.waiting),
    )


def _named(title: str, *rows: tuple[str, str]) -> Table:
    """A table of names and numbers."""
    table = Table(title=title, title_justify="left", title_style="bold", show_header=False)
    table.add_column("")
    table.add_column("", justify="right")
    for row in rows:
        table.add_row(*row)
    return table


def _size(count: int) -> str:
    return f"{count / 2**30:,.2f} GiB"


def done_fraction(iteration: int, seconds: float, budget: float, minimum: int) -> float:
    """Share of a phase that ends at `budget` seconds, and not before `minimum` iterations."""
    by_time = seconds / budget if budget > 0 else math.inf
    return min(by_time, iteration / max(minimum, 1)) if iteration < minimum else min(by_time, 1.0)


def show_summary(summary: dict[str, Any], out: Path, console: Console | None = None) -> None:
    """The scores before, after and steered as a table, and where the files are."""
    table = Table(
        title=f"Held-out prompts, n = {summary['evaluation_samples']}",
        title_justify="left",
        title_style="bold",
    )
    table.add_column("")
    for column in SCORES:
        table.add_column(column, justify="right")
    for row in score_rows(summary):
        table.add_row(*row)
    console = console or Console()
    console.print(table)
    console.print(f"Look at {out / 'report.html'}", highlight=False, soft_wrap=True)
