"""Charts of a run as inline SVG: matplotlib draws, the page's own text colour and font show through."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

BLUE, ORANGE, GREEN, RED = "#3b7ddd", "#e08a1e", "#2da160", "#e5534b"
_INK = "#010203"
"""Stands for the page's text colour; replaced by currentColor."""
GRID = "#8b949e"
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "lacfast",
    "font.size": 9,
    "text.color": _INK,
    "axes.edgecolor": GRID,
    "axes.labelcolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.7,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
}

Records = Sequence[dict[str, Any]]
"""Lines of metrics.jsonl of one phase."""
Values = np.ndarray[Any, Any]


def learning_curve(train: Records, reward: str, before: float, after: float) -> str:
    """Training reward per iteration, its running mean, and the held-out reward at both ends."""
    rewards = np.array([row.get(f"reward/{reward}", math.nan) for row in train], dtype=float)
    iterations = np.arange(1, len(rewards) + 1)
    with mpl.rc_context(STYLE):
        drawing, axes = figure()
        axes.plot(iterations, rewards, color=BLUE, alpha=0.4, linewidth=1, label="each iteration")
        axes.plot(iterations, running_mean(rewards), color=BLUE, linewidth=2, label="running mean")
        axes.plot(
            [0, len(rewards)],
            [before, after],
            "o--",
            color=ORANGE,
            linewidth=1,
            markersize=6,
            label="held out",
        )
        axes.set(xlabel="iteration", ylabel="mean reward")
        legend_above(axes)
        return svg(drawing)


def explained_variance_per_step(pretrained: Sequence[float], trained: Sequence[float]) -> str:
    """Held-out explained variance of the critic at every denoising step."""
    with mpl.rc_context(STYLE):
        drawing, axes = figure()
        for values, colour, label in (
            (pretrained, ORANGE, "after value pretraining"),
            (trained, BLUE, "after PPO"),
        ):
            axes.plot(_steps(values), values, "o-", color=colour, linewidth=1.6, markersize=4.5, label=label)
        axes.axhline(0, color=GRID, linewidth=0.7)
        axes.set(xlabel="denoising step (1: pure noise)", ylabel="explained variance", xticks=_steps(trained))
        axes.set_ylim(min(0, *pretrained, *trained) - 0.03, 1)
        legend_above(axes)
        return svg(drawing)


def explained_variance_per_iteration(rows: Records) -> str:
    """Mean explained variance over the logged steps, per iteration."""
    values = np.array([np.nanmean(row.get("explained_variance", [math.nan])) for row in rows])
    with mpl.rc_context(STYLE):
        drawing, axes = figure()
        axes.plot(np.arange(1, len(values) + 1), values, color=BLUE, alpha=0.4, linewidth=1)
        axes.plot(np.arange(1, len(values) + 1), running_mean(values), color=BLUE, linewidth=2)
        axes.axhline(0, color=GRID, linewidth=0.7)
        axes.set(xlabel="iteration", ylabel="explained variance")
        return svg(drawing)


def clip_fraction_per_step(train: Records) -> str:
    """Share of (sample, step) pairs whose update was clipped, mean over the run, both clips stacked."""
    high, low = _mean_per_step(train, "clip_fraction_high"), _mean_per_step(train, "clip_fraction_low")
    with mpl.rc_context(STYLE):
        drawing, axes = figure()
        axes.bar(_steps(high), high, color=BLUE, width=0.65, label="ratio above the clip")
        axes.bar(_steps(low), low, bottom=high, color=ORANGE, width=0.65, label="ratio below the clip")
        axes.set(xlabel="denoising step", ylabel="share clipped", xticks=_steps(high))
        legend_above(axes)
        return svg(drawing)


def kl_per_step(train: Records) -> str:
    """KL from the policy that sampled to the policy after the iteration's updates, mean over the run."""
    values = _mean_per_step(train, "kl_old")
    with mpl.rc_context(STYLE):
        drawing, axes = figure()
        axes.bar(_steps(values), values, color=GREEN, width=0.65)
        axes.ticklabel_format(axis="y", style="sci", scilimits=(0, 0), useMathText=True)
        axes.set(xlabel="denoising step", ylabel="KL per latent element", xticks=_steps(values))
        return svg(drawing)


def figure() -> tuple[Figure, Axes]:
    """An empty chart in the pages' size."""
    canvas = Figure(figsize=(4.1, 2.6), layout="constrained")
    FigureCanvasSVG(canvas)
    axes = canvas.add_subplot()
    axes.grid(axis="y", color=GRID, alpha=0.25, linewidth=0.6)
    axes.set_axisbelow(True)
    return canvas, axes


def legend_above(axes: Axes) -> None:
    """A legend over the chart, so that it covers no curve."""
    axes.legend(
        loc="lower left",
        bbox_to_anchor=(-0.02, 1.0),
        ncols=3,
        borderaxespad=0,
        handlelength=1.4,
        columnspacing=1.2,
    )


def _steps(values: Sequence[float] | Values) -> list[int]:
    return list(range(1, len(values) + 1))


def running_mean(values: Values) -> Values:
    """Mean over the last tenth of the run, at most what there is."""
    window = max(len(values) // 10, 1)
    return np.array([values[max(end - window, 0) : end].mean() for end in range(1, len(values) + 1)])


def _mean_per_step(train: Records, name: str) -> Values:
    """Mean over the iterations (K,); where a minibatch had no pair of a step, its NaN is left out."""
    rows = np.array([row[name] for row in train if name in row], dtype=float)
    if not len(rows):
        return np.zeros(0)
    means: Values = np.nansum(rows, axis=0) / np.maximum(np.isfinite(rows).sum(axis=0), 1)
    return means


def svg(figure: Figure) -> str:
    """The chart as an inline drawing that takes the page's text colour; the same every time."""
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    drawing = buffer.getvalue()
    return drawing[drawing.index("<svg") :].replace(_INK, "currentColor")
