"""A run in the terminal while it goes on: curves as sparklines, what the critic explains, what goes wrong."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from lacfast.report.diagnostics import findings
from lacfast.report.progress import Progress, duration, progress, read_run, silence
from lacfast.report.records import Record, Records, average, named, phase, recent

BARS = "▁▂▃▄▅▆▇█"
WIDTH = 36
"""Characters of a sparkline; longer curves are means of their parts."""


def watch(directory: Path, *, interval: float, console: Console | None = None) -> None:
    """Show a run until it is done, or once where the output is no terminal.

    Args:
        directory: of a run.
        interval: seconds between two looks at its files.
        console: where it shows. None: the terminal.

    Raises:
        ValueError: when the directory holds no run.
    """
    console = console or Console()
    records, settings = read_run(directory)
    if not console.is_terminal:
        console.print(screen(directory, records, settings))
        return
    with Live(screen(directory, records, settings), console=console, auto_refresh=False) as live:
        while not progress(records, settings).is_done:
            time.sleep(interval)
            records, settings = read_run(directory)
            live.update(screen(directory, records, settings), refresh=True)


def screen(directory: Path, records: Records, settings: dict[str, Any]) -> RenderableType:
    """What `lacfast watch` shows of a run; what a low terminal has no room for is cut from the end."""
    train = phase(records, "train")
    found = findings(records)
    parts: list[RenderableType] = [_state(directory, progress(records, settings), has_lines=bool(records))]
    for finding in found:
        # Names of rewards may hold brackets, which are no markup here.
        told = Text(f"! {finding.title}", style="bold yellow")
        told.append(f" (iteration {finding.iteration}): {finding.evidence}. ", style="not bold default")
        told.append(f"{finding.remedy}.", style="not bold cyan")
        parts.append(told)
    if train and not found:
        parts.append(Text("none of the known signatures of failure", style="green"))
    if records:
        parts.append(_curves(records, train))
    if train and len(_steps(train[-1], "explained_variance")) > 1:
        parts.append(_per_step(train))
    return Group(*parts)


def _state(directory: Path, found: Progress, *, has_lines: bool) -> Text:
    planned = "" if found.planned is None else f" of {found.planned:,}"
    line = Text(directory.resolve().name, style="bold")
    if not has_lines:
        line.append("  has begun and written no line yet: it loads or makes its model", style="not bold")
        if silent := silence(directory, found):
            line.append(f", for {duration(silent)}: it has ended, or hangs", style="not bold red")
        return line
    if found.iteration == 0 and found.pretraining:
        line.append(f"  value pretraining, iteration {found.pretraining:,}", style="not bold")
        if silent := silence(directory, found):
            line.append(f", no line for {duration(silent)}: it has ended, or hangs", style="not bold red")
        return line
    line.append(f"  iteration {found.iteration:,}{planned}, {found.images:,} images", style="not bold")
    if math.isfinite(found.images_per_second):
        line.append(f", {found.images_per_second:.3g} images/s", style="not bold")
    if found.is_done:
        line.append(", done", style="green")
    elif silent := silence(directory, found):
        line.append(f", no line for {duration(silent)}: it has ended, or hangs", style="not bold red")
    elif math.isfinite(found.seconds_left):
        line.append(f", {duration(found.seconds_left)} left", style="not bold")
    return line


def _curves(records: Records, train: Sequence[Record]) -> Table:
    """Rewards, scores, the critic and the clip over the iterations."""
    evaluations = phase(records, "evaluate")
    rows = [(name, [average([each], f"reward/{name}") for each in train]) for name in _rewards(train)]
    rows += [
        (f"{name}, evaluated", [average([each], name) for each in evaluations])
        for name in (named(evaluations[-1], "standard_error") if evaluations else [])
    ]
    rows += [
        (title, [average([each], name) for each in train])
        for title, name in (
            ("explained variance", "explained_variance"),
            ("clipped from above", "clip_fraction_high"),
            ("clipped from below", "clip_fraction_low"),
            ("KL, new from old", "mean_kl_old"),
            ("distance from the old policy", "distance_old"),
        )
    ]
    pretraining = phase(records, "value_pretraining")
    rows.append(
        (
            "value pretraining",
            [average([each], "explained_variance") for each in pretraining] if not train else [],
        )
    )
    table = _table("", "over the iterations", "first", "now")
    for title, values in rows:
        known = [value for value in values if math.isfinite(value)]
        if known:
            table.add_row(Text(title), sparkline(values), f"{known[0]:.3g}", f"{known[-1]:.3g}")
    return table


def _per_step(train: Sequence[Record]) -> Table:
    """What the critic explains and what is clipped, from pure noise on the left to the image."""
    last = recent(train)
    table = _table("", "over the denoising steps", "first", "last")
    for title, name, top in (
        ("explained variance", "explained_variance", 1.0),
        ("clipped from above", "clip_fraction_high", None),
        ("clipped from below", "clip_fraction_low", None),
    ):
        rows = [_steps(each, name) for each in last]
        rows = [row for row in rows if len(row) == len(rows[-1])]
        values = [_mean([row[step] for row in rows]) for step in range(len(rows[-1]))]
        known = [value for value in values if math.isfinite(value)]
        if known:
            line = sparkline(values, low=0.0, high=top)
            table.add_row(Text(title), line, f"{known[0]:.2f}", f"{known[-1]:.2f}")
    return table


def _table(*titles: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for index, title in enumerate(titles):
        table.add_column(title, justify="right" if index > 1 else "left", no_wrap=True)
    return table


def _rewards(train: Sequence[Record]) -> list[str]:
    return named(train[-1], "reward") if train else []


def _steps(record: Record, name: str) -> list[float]:
    """A metric per step, NaN for what was not trained; [] for one that is no vector."""
    value = record.get(name)
    return [math.nan if each is None else float(each) for each in value] if isinstance(value, list) else []


def _mean(values: Sequence[float]) -> float:
    known = [value for value in values if math.isfinite(value)]
    return sum(known) / len(known) if known else math.nan


def sparkline(values: Sequence[float], *, low: float | None = None, high: float | None = None) -> str:
    """Values as bars between `low` and `high`, None: their own extremes; a blank where one is missing."""
    if len(values) > WIDTH:
        ends = [round(index * len(values) / WIDTH) for index in range(WIDTH + 1)]
        values = [_mean(values[start:end]) for start, end in pairwise(ends)]
    known = [value for value in values if math.isfinite(value)]
    if not known:
        return " " * len(values)
    bottom = min(known) if low is None else low
    height = (max(known) if high is None else high) - bottom

    def bar(value: float) -> str:
        if not math.isfinite(value):
            return " "
        share = (value - bottom) / height if height > 0 else 0.0
        return BARS[min(max(int(share * len(BARS)), 0), len(BARS) - 1)]

    return "".join(map(bar, values))
