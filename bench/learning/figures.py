"""Curves of a claim as a picture: mean over the seeds, band of one standard error."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import numpy as np
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from bench.learning.analysis import Cost, along, common_budget, images, seconds
from bench.learning.runs import Point

Curves = Mapping[str, Sequence[Sequence[Point]]]
"""Arm -> one curve per seed."""


def draw(curves: Curves, metrics: Sequence[str], path: Path, timed: bool) -> None:
    """Two metrics at most, along images and, of runs whose times compare, along seconds, as one PNG."""
    axes_of: list[tuple[Cost, str]] = [(images, "images")]
    if timed:
        axes_of.append((seconds(0.0), "CPU seconds, free reward"))
    size = 4.5 * len(axes_of), 3.2 * len(metrics[:2])
    figure, grid = plt.subplots(len(metrics[:2]), len(axes_of), figsize=size, squeeze=False, sharey="row")
    for row, metric in zip(grid, metrics[:2], strict=True):
        for axes, (cost, label) in zip(row, axes_of, strict=True):
            for name, runs in curves.items():
                _band(axes, name, runs, cost, metric)
            axes.set_xlabel(label)
            axes.grid(alpha=0.3)
        row[0].set_ylabel(metric)
    grid[0][0].legend(fontsize=8)
    figure.tight_layout()
    save(figure, path)


def overview(studies: Mapping[str, tuple[str, Curves, Curves]], path: Path) -> None:
    """Studies by title with their metric: along images, and along seconds with a free and a dear reward.

    Args:
        studies: title -> metric, curves, and those of them that one machine made, which alone have seconds.
        path: of the picture.
    """
    axes_of: list[tuple[Cost, str]] = [
        (images, "images"),
        (seconds(0.0), "CPU seconds, free reward"),
        (seconds(0.05), "CPU seconds, reward of 50 ms"),
    ]
    figure, grid = plt.subplots(
        len(studies), len(axes_of), figsize=(13, 3.6 * len(studies)), squeeze=False, sharey="row"
    )
    for row, (title, (metric, curves, timed)) in zip(grid, studies.items(), strict=True):
        colours = {name: f"C{number}" for number, name in enumerate(curves)}
        for axes, (cost, label) in zip(row, axes_of, strict=True):
            for name, runs in (curves if cost is images else timed).items():
                _band(axes, name, runs, cost, metric, colours[name])
            axes.set_xlabel(label)
            axes.grid(alpha=0.3)
        row[0].set_ylabel(f"{title}: {metric}")
    grid[0][0].legend(fontsize=8)
    figure.tight_layout()
    save(figure, path)


def save(figure: Figure, path: Path) -> None:
    """Write the picture and close it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # No date in the file: the same results give the same picture.
    figure.savefig(path, dpi=110, metadata={"Software": ""})
    plt.close(figure)


def _band(
    axes: plt.Axes,
    name: str,
    runs: Sequence[Sequence[Point]],
    cost: Cost,
    metric: str,
    colour: str | None = None,
) -> None:
    grid = np.linspace(0, common_budget(runs, cost), 60)
    scores = np.stack([np.interp(grid, *along(points, cost, metric)) for points in runs])
    mean = scores.mean(axis=0)
    error = scores.std(axis=0, ddof=1) / len(runs) ** 0.5 if len(runs) > 1 else np.zeros_like(mean)
    (line,) = axes.plot(grid, mean, label=f"{name} ({len(runs)})", color=colour)
    axes.fill_between(grid, mean - error, mean + error, alpha=0.2, color=line.get_color())
