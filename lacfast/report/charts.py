"""Charts of a run as inline SVG: curves over iterations, maps of iteration by step, what the critic explains.

Matplotlib draws; the page's own text colour and font show through.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lacfast.report.records import Record, Records, average, named, phase

BLUE, ORANGE, GREEN, RED = "#3b7ddd", "#e08a1e", "#2da160", "#e5534b"
COLOURS = (BLUE, ORANGE, GREEN, RED, "#8250df", "#0598bc")
_INK = "#010203"
"""Stands for the page's text colour; replaced by currentColor."""
GRID = "#8b949e"
SAME_SIZE = 10
"""Curves whose largest values are further apart than by this factor get charts of their own."""
_LEGEND_CHARACTERS = 45
"""Characters of labels that fit beside each other."""
_LONGEST_LABEL = 40
"""Characters of a label that fit; of a longer one both ends are shown."""
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

Values = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Drawing:
    """A chart with its caption."""

    title: str
    meaning: str
    svg: str


def drawings(records: Records) -> Iterator[Drawing]:
    """All charts that the lines of a metrics.jsonl have numbers for."""
    train, evaluations = phase(records, "train"), phase(records, "evaluate")
    yield Drawing(
        "Rewards that train",
        "Mean over each iteration's own images, and its running mean.",
        _curves(train, {name: f"reward/{name}" for name in named(train[-1], "reward")}, "mean reward"),
    )
    if len(evaluations) > 1:
        for judged in alike(evaluations, named(evaluations[-1], "standard_error")):
            yield Drawing(
                "Scores of evaluations",
                "Same prompts and noise every time. A score that nothing trains on and that falls: hacking.",
                _curves(evaluations, {name: name for name in judged}, "mean score", smooth=False),
            )
        if _has(evaluations, "latent_drift"):
            yield Drawing(
                "Drift of what is typical",
                "Distance of the median latent from the first evaluation's. No prompt asks for what all "
                "images share: a tint, a grid, a pattern in the ground.",
                _curves(evaluations, {"": "latent_drift"}, "RMS distance", smooth=False),
            )
        if _has(evaluations, "diversity"):
            yield Drawing(
                "Diversity",
                "Mean distance of two images of one prompt.",
                _curves(evaluations, {"": "diversity"}, "RMS distance", smooth=False),
            )
    if _has(train, "explained_variance"):
        yield from _critic(train, evaluations, phase(records, "value_pretraining"))
    for title, meaning, name, label in _MAPS:
        # What was 0 everywhere, as the KL without an anchor, would be a map of one colour.
        if any(np.nan_to_num(_array(record.get(name))).any() for record in train):
            yield Drawing(title, meaning, _map(train, name, label))
    norms = {"policy": "policy_grad_norm", "critic": "critic_grad_norm"}
    yield Drawing(
        "Gradient norms",
        "Before clipping, mean over an iteration's optimizer steps.",
        _curves(train, {label: name for label, name in norms.items() if _has(train, name)}, "norm", log=True),
    )
    if _has(train, "first_max_abs_log_ratio"):
        yield Drawing(
            "First ratio",
            "Largest |log ratio| before any update; 0 says that rollout and update compute one policy.",
            _curves(train, {"": "first_max_abs_log_ratio"}, "|log ratio|", smooth=False),
        )
    phases = {"rollout": "seconds_rollout", "update": "seconds_update"}
    yield Drawing("Time", "Of an iteration, rewards within the rollout.", _curves(train, phases, "seconds"))


_MAPS = (
    ("Advantages, per step", "Deviation before normalisation.", "advantage_std", "deviation"),
    ("Clipped from above, per step", "Share of pairs.", "clip_fraction_high", "share"),
    ("Clipped from below, per step", "Share of pairs.", "clip_fraction_low", "share"),
    ("KL, per step", "Per latent element, new from old policy.", "kl_old", "KL"),
    ("Distance from the old policy, per step", "Square per element of the output.", "distance_old", "square"),
    ("KL to the anchor, per step", "Per latent element.", "kl_ref", "KL"),
)
"""Title, meaning, metric per denoising step, unit."""


def _critic(train: Records, evaluations: Records, pretraining: Records) -> Iterator[Drawing]:
    if _has(pretraining, "explained_variance"):
        yield Drawing(
            "The critic in value pretraining",
            "Explained variance, mean over the steps; on held-out prompts the best critic is kept.",
            _curves(pretraining, {"": "explained_variance"}, "explained variance"),
        )
    yield Drawing(
        "What the critic explains, per step",
        "Share of the rewards' variance, on each rollout before the critic learns from it.",
        _map(train, "explained_variance", "explained variance", low=0.0, high=1.0),
    )
    if _has(evaluations, "explained_variance"):
        yield Drawing(
            "What the critic explains on evaluation prompts",
            "The last evaluation; dashed: what the prompt alone explains, and what no critic can pass. From "
            "pure noise only the prompt's difficulty can be known.",
            _bounded_variance(evaluations[-1], [*pretraining, *evaluations]),
        )
    if evaluations and (heads := named(evaluations[-1], "calibration")):
        yield Drawing(
            "Calibration on evaluation prompts",
            "Mean return over predicted value, ten bins of as many states, the last evaluation; dashed: "
            "as predicted. Flatter is overconfident, steeper is timid.",
            _reliability({head: _array(evaluations[-1][f"calibration/{head}"]) for head in heads}),
        )
    if _has(train, "value_slope"):
        yield Drawing(
            "Calibration over the run",
            "Slope of the rewards over the values: 1 is calibrated, less is overconfident.",
            _curves(train, {"": "value_slope"}, "slope", level=1.0),
        )
    losses = {"all heads": "value_loss"} | {
        head: f"value_loss/{head}" for head in named(train[-1], "value_loss")
    }
    yield Drawing("Value loss", "In standardised units.", _curves(train, losses, "loss"))


def alike(records: Records, names: Sequence[str]) -> list[list[str]]:
    """Metrics that fit into one chart together, so that no curve is flat beside a larger one."""
    curves = {name: np.nan_to_num([average([record], name) for record in records]) for name in names}
    sizes = {name: float(np.abs(curve).max()) for name, curve in curves.items()}
    groups: list[list[str]] = []
    for name in sorted(names, key=lambda name: -sizes[name]):
        if not groups or sizes[name] * SAME_SIZE < sizes[groups[-1][0]]:
            groups.append([])
        groups[-1].append(name)
    return [[name for name in names if name in group] for group in groups]


def _array(value: Any) -> Values:
    """Numbers of a line, JSON's null, which a tracker may write for NaN, as NaN."""
    return np.array(value, dtype=float)


def _has(records: Records, name: str) -> bool:
    return any(np.isfinite(_array(record.get(name))).any() for record in records)


def _curves(
    records: Records,
    names: dict[str, str],
    label: str,
    *,
    smooth: bool = True,
    log: bool = False,
    level: float | None = None,
) -> str:
    """One line per metric over the iterations; `names` maps its label to its name in the records."""
    iterations = [record["iteration"] for record in records]

    def draw(axes: Axes) -> None:
        for number, (title, name) in enumerate(names.items()):
            colour = COLOURS[number % len(COLOURS)]
            values = np.array([average([record], name) for record in records])
            axes.plot(iterations, values, color=colour, alpha=0.35 if smooth else 1.0, linewidth=1)
            line = running_mean(values) if smooth else values
            # A single point makes no line.
            marker = "o" if len(values) == 1 else None
            axes.plot(iterations, line, color=colour, linewidth=2, label=_label(title), marker=marker)
        if level is not None:
            axes.axhline(level, color=GRID, linewidth=0.9, linestyle="--")
        if log:
            axes.set_yscale("log")
        axes.set(xlabel="iteration", ylabel=label)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))

    return svg(draw, legend=any(names))


def _reliability(bins: dict[str, Values]) -> str:
    """Reliability diagram, a line per head; bars are one standard error."""

    def draw(axes: Axes) -> None:
        for number, (name, (values, returns, errors)) in enumerate(bins.items()):
            axes.errorbar(
                values,
                returns,
                yerr=np.nan_to_num(errors),
                fmt="o-",
                color=COLOURS[number % len(COLOURS)],
                markersize=4,
                linewidth=1.2,
                elinewidth=0.8,
                label=_label(name),
            )
        reached = np.concatenate([found[0] for found in bins.values()])
        ends = [float(reached.min()), float(reached.max())]
        axes.plot(ends, ends, "--", color=GRID, linewidth=0.9)
        axes.set(xlabel="value, deviations of the reward", ylabel="mean return")
        axes.locator_params(axis="x", nbins=6)

    return svg(draw)


def _map(
    records: Records, name: str, label: str, *, low: float | None = None, high: float | None = None
) -> str:
    """Denoising step by iteration, as colours."""
    rows = [record for record in records if record.get(name)]
    values = np.array([_array(record[name]) for record in rows]).T

    def draw(axes: Axes) -> None:
        axes.grid(False)
        picture = axes.imshow(
            values,
            aspect="auto",
            interpolation="nearest",
            extent=(rows[0]["iteration"] - 0.5, rows[-1]["iteration"] + 0.5, len(values) + 0.5, 0.5),
            vmin=low,
            vmax=high,
        )
        # At most eight step numbers.
        ticks = range(1, len(values) + 1, max(1, math.ceil(len(values) / 8)))
        axes.set(xlabel="iteration", ylabel="denoising step", yticks=list(ticks))
        axes.figure.colorbar(picture, ax=axes, label=label)

    return svg(draw, legend=False)


def _bounded_variance(evaluation: Record, bounded: Records) -> str:
    """Explained variance per step of an evaluation between the bounds that were measured last."""
    values = _array(evaluation["explained_variance"])
    steps = np.arange(1, len(values) + 1)

    def draw(axes: Axes) -> None:
        axes.plot(steps, values, "o-", color=BLUE, markersize=4, label="critic")
        for name, colour in (("floor", RED), ("ceiling", GREEN)):
            logged = [_array(record.get(f"explained_variance_{name}")) for record in bounded]
            found = [bound for bound in logged if np.isfinite(bound).any()]
            if found:
                bound = np.broadcast_to(found[-1], steps.shape)
                axes.plot(steps, bound, "--", color=colour, linewidth=1.2, label=name)
        axes.axhline(0, color=GRID, linewidth=0.7)
        axes.set(xlabel="denoising step (1: pure noise)", ylabel="explained variance")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))

    return svg(draw)


def running_mean(values: Values) -> Values:
    """Mean over the last tenth of the run, at most what there is."""
    window = max(len(values) // 10, 1)
    return np.array([values[max(end - window, 0) : end].mean() for end in range(1, len(values) + 1)])


def _label(name: str) -> str:
    """A reward's name as a legend shows it; matplotlib leaves out what begins with an underscore."""
    if len(name) > _LONGEST_LABEL:
        half = _LONGEST_LABEL // 2
        name = f"{name[:half]}…{name[-half:]}"
    return f"\u200b{name}" if name.startswith("_") else name


def svg(draw: Callable[[Axes], None], *, legend: bool = True) -> str:
    """The chart as an inline drawing that takes the page's text colour; the same every time."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(4.1, 2.6), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        axes.grid(axis="y", color=GRID, alpha=0.25, linewidth=0.6)
        axes.set_axisbelow(True)
        draw(axes)
        if legend:
            # Over the chart, so that it covers no curve.
            place = (-0.02, 1.0)
            longest = max(len(name) for name in axes.get_legend_handles_labels()[1])
            columns = min(max(_LEGEND_CHARACTERS // longest, 1), 3)
            shown = axes.legend(
                loc="lower left", bbox_to_anchor=place, borderaxespad=0, ncols=columns, columnspacing=1.2
            )
            for text in shown.get_texts():
                # A reward's name with two dollar signs is no formula.
                text.set_parse_math(False)
        buffer = io.StringIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    drawing = buffer.getvalue()
    return drawing[drawing.index("<svg") :].replace(_INK, "currentColor")
