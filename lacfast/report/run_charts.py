"""Charts of a training run: curves over iterations, and maps of iteration by denoising step."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes

from lacfast.report.charts import (
    BLUE,
    GREEN,
    GRID,
    ORANGE,
    RED,
    STYLE,
    Records,
    Values,
    figure,
    legend_above,
    running_mean,
    svg,
)

COLOURS = (BLUE, ORANGE, GREEN, RED, "#8250df", "#0598bc")


@dataclass(frozen=True)
class Drawing:
    """A chart with its caption."""

    title: str
    meaning: str
    svg: str


def scores(evaluations: Records) -> list[str]:
    """Names of what the evaluations scored."""
    prefix = "standard_error/"
    return [name.removeprefix(prefix) for name in evaluations[-1] if name.startswith(prefix)]


def calibration(evaluation: dict[str, Any]) -> dict[str, Values]:
    """Head -> (3, K) mean value, mean return and its standard error per bin, where it was logged."""
    prefix = "calibration/"
    found = {name.removeprefix(prefix): _filled(bins) for name, bins in evaluation.items() if prefix in name}
    return {name: np.asarray(bins, dtype=float) for name, bins in found.items()}


def drawings(train: Records, evaluations: Records, pretraining: Records) -> Iterator[Drawing]:
    """All charts that the records have numbers for."""
    names = [name.removeprefix("reward/") for name in train[-1] if name.startswith("reward/")]
    yield Drawing(
        "Rewards that train",
        "Mean over each iteration's own images, and its running mean.",
        _curves(train, {name: f"reward/{name}" for name in names}, "mean reward"),
    )
    if len(evaluations) > 1:
        judged = scores(evaluations)
        yield Drawing(
            "Scores of evaluations",
            "Same prompts and noise every time. A score that nothing trains on and that falls: hacking.",
            _curves(evaluations, {name: name for name in judged}, "mean score", smooth=False),
        )
        if any(math.isfinite(record.get("diversity", math.nan)) for record in evaluations):
            yield Drawing(
                "Diversity",
                "Mean distance of two images of one prompt.",
                _curves(evaluations, {"": "diversity"}, "RMS distance", smooth=False),
            )
    yield from _critic(train, evaluations, pretraining)
    for title, meaning, name, label in _MAPS:
        if _has(train, name):
            yield Drawing(title, meaning, _map(train, name, label))
    norms = {"policy": "policy_grad_norm", "critic": "critic_grad_norm"}
    yield Drawing(
        "Gradient norms",
        "Before clipping, mean over an iteration's optimizer steps.",
        _curves(train, {label: name for label, name in norms.items() if _has(train, name)}, "norm", log=True),
    )
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
    ("KL to the reference, per step", "Per latent element.", "kl_ref", "KL"),
)
"""Title, meaning, metric per denoising step, unit."""


def _critic(train: Records, evaluations: Records, pretraining: Records) -> Iterator[Drawing]:
    if not _has(train, "explained_variance"):
        return
    yield Drawing(
        "What the critic explains, per step",
        "Share of the rewards' variance, on each rollout before the critic learns from it.",
        _map(train, "explained_variance", "explained variance", low=0.0, high=1.0),
    )
    if _has(evaluations, "explained_variance"):
        yield Drawing(
            "What the critic explains on evaluation prompts",
            "The last evaluation; dashed: what the prompt alone explains, and what no critic can pass.",
            _bounded_variance(evaluations[-1], [*pretraining, *evaluations]),
        )
    if evaluations and (bins := calibration(evaluations[-1])):
        yield Drawing(
            "Calibration on evaluation prompts",
            "Mean return over predicted value, ten bins of as many states, the last evaluation; dashed: "
            "as predicted. Flatter is overconfident, steeper is timid.",
            _reliability(bins),
        )
    if _has(train, "value_slope"):
        yield Drawing(
            "Calibration over the run",
            "Slope of the rewards over the values: 1 is calibrated, less is overconfident.",
            _curves(train, {"": "value_slope"}, "slope", level=1.0),
        )
    losses = {"all heads": "value_loss"} | {
        name.removeprefix("value_loss/"): name for name in train[-1] if name.startswith("value_loss/")
    }
    yield Drawing("Value loss", "In standardised units.", _curves(train, losses, "loss"))


def _has(records: Records, name: str) -> bool:
    return any(np.isfinite(np.asarray(_filled(record[name]))).any() for record in records if record.get(name))


def _filled(value: Any) -> Any:
    """JSON's null, which a tracker may write for NaN, as NaN."""
    if isinstance(value, list):
        return [_filled(each) for each in value]
    return math.nan if value is None else float(value)


def _mean(value: Any) -> float:
    values = np.atleast_1d(np.asarray(_filled(value), dtype=float))
    return float(np.nanmean(values)) if np.isfinite(values).any() else math.nan


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
    with mpl.rc_context(STYLE):
        drawing, axes = figure()
        for (title, name), colour in zip(names.items(), _cycle(len(names)), strict=True):
            values = np.array([_mean(record.get(name)) for record in records])
            axes.plot(iterations, values, color=colour, alpha=0.35 if smooth else 1.0, linewidth=1)
            axes.plot(
                iterations, running_mean(values) if smooth else values, color=colour, linewidth=2, label=title
            )
        if level is not None:
            axes.axhline(level, color=GRID, linewidth=0.9, linestyle="--")
        if log:
            axes.set_yscale("log")
        axes.set(xlabel="iteration", ylabel=label)
        if any(names):
            legend_above(axes)
        return svg(drawing)


def _reliability(bins: dict[str, Values]) -> str:
    """Reliability diagram, a line per head; bars are one standard error."""
    with mpl.rc_context(STYLE):
        drawing, axes = figure()
        for (name, (values, returns, errors)), colour in zip(bins.items(), _cycle(len(bins)), strict=True):
            axes.errorbar(
                values,
                returns,
                yerr=np.nan_to_num(errors),
                fmt="o-",
                color=colour,
                markersize=4,
                linewidth=1.2,
                elinewidth=0.8,
                label=name,
            )
        reached = np.concatenate([found[0] for found in bins.values()])
        ends = [float(reached.min()), float(reached.max())]
        axes.plot(ends, ends, "--", color=GRID, linewidth=0.9)
        axes.set(xlabel="value, deviations of the reward", ylabel="mean return")
        legend_above(axes)
        return svg(drawing)


def _cycle(count: int) -> Sequence[str]:
    return [COLOURS[index % len(COLOURS)] for index in range(count)]


def _map(
    records: Records, name: str, label: str, *, low: float | None = None, high: float | None = None
) -> str:
    """Denoising step by iteration, as colours."""
    rows = [record for record in records if record.get(name)]
    values: Values = np.array([_filled(record[name]) for record in rows], dtype=float).T
    with mpl.rc_context(STYLE):
        drawing, axes = figure()
        axes.grid(False)
        edges = rows[0]["iteration"] - 0.5, rows[-1]["iteration"] + 0.5
        picture = axes.imshow(
            values,
            aspect="auto",
            interpolation="nearest",
            extent=(edges[0], edges[1], len(values) + 0.5, 0.5),
            vmin=low,
            vmax=high,
        )
        axes.set(xlabel="iteration", ylabel="denoising step", yticks=_some(len(values)))
        drawing.colorbar(picture, ax=axes, label=label)
        return svg(drawing)


def _some(steps: int) -> list[int]:
    """At most eight step numbers."""
    stride = max(1, math.ceil(steps / 8))
    return list(range(1, steps + 1, stride))


def _bounded_variance(evaluation: dict[str, Any], bounded: Records) -> str:
    values = np.asarray(_filled(evaluation["explained_variance"]), dtype=float)
    with mpl.rc_context(STYLE):
        drawing, axes = figure()
        axes.plot(np.arange(1, len(values) + 1), values, "o-", color=BLUE, markersize=4, label="critic")
        for name, colour, title in (
            ("explained_variance_floor", RED, "floor"),
            ("explained_variance_ceiling", GREEN, "ceiling"),
        ):
            _bound(axes, bounded, name, colour, title)
        axes.axhline(0, color=GRID, linewidth=0.7)
        axes.set(xlabel="denoising step (1: pure noise)", ylabel="explained variance")
        legend_above(axes)
        return svg(drawing)


def _bound(axes: Axes, records: Records, name: str, colour: str, title: str) -> None:
    found = [record[name] for record in records if record.get(name) is not None]
    if found:
        bound = np.atleast_1d(np.asarray(_filled(found[-1]), dtype=float))
        places = np.arange(1, len(bound) + 1)
        if len(bound) == 1:
            axes.axhline(float(bound[0]), color=colour, linestyle="--", linewidth=1.2, label=title)
        else:
            axes.plot(places, bound, "--", color=colour, linewidth=1.2, label=title)
