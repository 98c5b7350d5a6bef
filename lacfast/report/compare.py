"""Runs laid over one another: their curves in one chart each, and what their settings differ in."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from lacfast.report.charts import COLOURS, running_mean, svg
from lacfast.report.diagnostics import findings
from lacfast.report.page import fill, flat
from lacfast.report.progress import progress, read_run
from lacfast.report.records import Records, average, named, phase, recent

AXES = {"images": "images", "iterations": "iteration", "hours": "hours of rollouts and updates"}
"""What the curves can stand over -> its label."""
MOST_RUNS = 6
"""Runs that have a colour each that one can tell apart."""


@dataclass(frozen=True)
class Run:
    """A run that is compared with others."""

    name: str
    records: Records
    settings: dict[str, Any]


@dataclass(frozen=True)
class Curve:
    """A metric that several runs may have."""

    title: str
    meaning: str
    name: str
    label: str
    phase: str = "train"

    def of(self, run: Run, axis: str) -> tuple[list[float], list[float]]:
        """Where the points of a run stand, and their values; points without a value are left out."""
        records = phase(run.records, self.phase)
        pairs = zip(places(run, records, axis), (average([each], self.name) for each in records), strict=True)
        known = [pair for pair in pairs if all(map(math.isfinite, pair))]
        return [place for place, _ in known], [value for _, value in known]


def write_comparison(directories: Sequence[Path], page: Path) -> Path:
    """Write the page that compares runs.

    Raises:
        ValueError: for fewer than two runs, more than there are colours, or a directory without one.
    """
    if not 2 <= len(directories) <= MOST_RUNS:
        raise ValueError(f"{len(directories)} runs cannot be compared; give 2 to {MOST_RUNS} directories")
    names = unique_names(directories)
    runs = [Run(name, *read_run(path)) for name, path in zip(names, directories, strict=True)]
    for run, path in zip(runs, directories, strict=True):
        if not phase(run.records, "train"):
            raise ValueError(f"{path} has not finished an iteration, so there is nothing to compare yet")
    page.write_text(render(runs), encoding="utf-8")
    return page


def unique_names(directories: Sequence[Path]) -> list[str]:
    """The last parts of the paths, as many as it takes to tell them apart."""
    parts = [path.resolve().parts for path in directories]
    for count in range(1, max(map(len, parts)) + 1):
        found = ["/".join(each[-count:]) for each in parts]
        if len(set(found)) == len(found):
            return found
    raise ValueError("the same directory is given twice; every run is compared once")


def render(runs: Sequence[Run]) -> str:
    """The page as text."""
    return fill(
        "compare.html",
        title=escape(", ".join(run.name for run in runs)),
        count=len(runs),
        legend="\n".join(_legend(runs)),
        axes="\n".join(_axes()),
        hiding=_hiding(len(runs)),
        table=_table(runs),
        charts="\n".join(_charts(runs)),
        settings=_differences(runs),
    )


def places(run: Run, records: Records, axis: str) -> list[float]:
    """Where records stand on an axis: iterations, images or hours, as its training lines have them."""
    train = phase(run.records, "train")
    if axis == "iterations":
        return [float(record["iteration"]) for record in records]
    if axis == "images":
        reached = [float(record.get("images", math.nan)) for record in train]
    else:
        seconds = [average([each], "seconds_rollout") + average([each], "seconds_update") for each in train]
        reached = list(np.cumsum(seconds) / 3600)
    steps = [0.0, *(float(record["iteration"]) for record in train)]
    start = 0.0 if axis == "hours" else 2 * reached[0] - reached[1] if len(reached) > 1 else 0.0
    return list(np.interp([float(record["iteration"]) for record in records], steps, [start, *reached]))


def curves(runs: Sequence[Run]) -> list[Curve]:
    """What at least one of the runs has numbers for."""
    last = [phase(run.records, "train")[-1] for run in runs]
    rewards = dict.fromkeys(name for record in last for name in named(record, "reward"))
    evaluations = [found[-1] for run in runs if (found := phase(run.records, "evaluate"))]
    scores = dict.fromkeys(name for record in evaluations for name in named(record, "standard_error"))
    known = [
        *(
            Curve(f"{name}, evaluated", "Mean over the evaluation prompts.", name, "mean score", "evaluate")
            for name in scores
        ),
        *(
            Curve(
                f"{name}, own images", "Running mean over each iteration's own.", f"reward/{name}", "reward"
            )
            for name in rewards
        ),
        Curve("Explained variance", "Of the critic, mean over the steps.", "explained_variance", "share"),
        Curve("Clipped from above", "Share of pairs.", "clip_fraction_high", "share"),
        Curve("Clipped from below", "Share of pairs.", "clip_fraction_low", "share"),
        Curve("KL per iteration", "Per latent element, new from old.", "mean_kl_old", "KL"),
        Curve("Distance from the old policy", "Square per element of the output.", "distance_old", "square"),
        Curve("Diversity", "Mean distance of two images of one prompt.", "diversity", "RMS", "evaluate"),
    ]
    return [curve for curve in known if any(curve.of(run, "iterations")[0] for run in runs)]


def _charts(runs: Sequence[Run]) -> Iterable[str]:
    for curve in curves(runs):
        drawn = "".join(f'<div class="over {axis}">{_overlay(runs, curve, axis)}</div>' for axis in AXES)
        title, meaning = escape(curve.title), escape(curve.meaning)
        yield f'<div class="chart"><h3>{title}</h3><p>{meaning}</p>{drawn}</div>'


def _overlay(runs: Sequence[Run], curve: Curve, axis: str) -> str:
    def draw(axes: Axes) -> None:
        for number, run in enumerate(runs):
            where, values = curve.of(run, axis)
            shown = values if curve.phase == "evaluate" else running_mean(np.array(values))
            marker = "o" if len(values) < 8 else None
            (line,) = axes.plot(
                where, shown, color=COLOURS[number], linewidth=1.8, marker=marker, markersize=3.5
            )
            line.set_gid(f"run-{number}")
        axes.set(xlabel=AXES[axis], ylabel=curve.label)

    # An id stands once on a page, a class in every chart.
    return svg(draw, legend=False).replace('id="run-', 'class="run-')


def _legend(runs: Sequence[Run]) -> Iterable[str]:
    for number, run in enumerate(runs):
        yield (
            f'<label><input type="checkbox" id="show-{number}" checked>'
            f'<span class="swatch" style="background:{COLOURS[number]}"></span>{escape(run.name)}</label>'
        )


def _axes() -> Iterable[str]:
    for axis in AXES:
        chosen = " checked" if axis == "images" else ""
        yield f'<label><input type="radio" name="axis" id="axis-{axis}"{chosen}>{axis}</label>'


def _hiding(count: int) -> str:
    """Rules that hide a run whose box is empty, and the axes that are not chosen; no script is needed."""
    hidden = "{ display: none; }"
    rules = [f"main:has(#show-{number}:not(:checked)) .run-{number} {hidden}" for number in range(count)]
    rules += [f"main:not(:has(#axis-{axis}:checked)) .over.{axis} {hidden}" for axis in AXES]
    return "\n".join(rules)


def _table(runs: Sequence[Run]) -> str:
    """What became of each run, a row per run."""
    heads = "".join(
        f"<th>{head}</th>" for head in ("run", "iterations", "images", "images/s", "rewards", "signs")
    )
    rows = []
    for run in runs:
        train = phase(run.records, "train")
        found, last = progress(run.records, run.settings), recent(train)
        rewards = (f"{name} {average(last, f'reward/{name}'):.3g}" for name in named(train[-1], "reward"))
        signs = ", ".join(finding.title for finding in findings(run.records)) or "none"
        speed = f"{found.images_per_second:.3g}" if math.isfinite(found.images_per_second) else "?"
        cells = (run.name, f"{found.iteration:,}", f"{found.images:,}", speed, ", ".join(rewards), signs)
        rows.append("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>")
    return f'<div class="scroll"><table><tr>{heads}</tr>{"".join(rows)}</table></div>'


def differences(runs: Sequence[Run]) -> dict[str, list[str]]:
    """Settings that are not the same in all runs, with the value of each; "" where it has none."""
    found = [{name: str(value) for name, value in flat(run.settings)} for run in runs]
    names = dict.fromkeys(name for settings in found for name in settings)
    values = {name: [settings.get(name, "") for settings in found] for name in names}
    return {name: each for name, each in values.items() if len(set(each)) > 1}


def _differences(runs: Sequence[Run]) -> str:
    found = differences(runs)
    if not found:
        return '<p class="soft">All settings are the same, or no run.json tells them.</p>'
    heads = "".join(f"<th>{escape(run.name)}</th>" for run in runs)
    rows = "".join(
        f"<tr><td><code>{escape(name)}</code></td>"
        + "".join(f"<td><code>{escape(value)}</code></td>" for value in values)
        + "</tr>"
        for name, values in found.items()
    )
    return f'<div class="scroll"><table><tr><th>setting</th>{heads}</tr>{rows}</table></div>'
