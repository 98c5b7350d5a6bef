"""The part of docs/results.md about critics: explained variance by step between floor and ceiling."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import numpy as np
from matplotlib import pyplot as plt

from bench.learning import units
from bench.learning.analysis import paired
from bench.learning.critic_variance import MEASURES, Cell, Scale, branch_preset, cells
from bench.learning.figures import save

QUESTIONS = {
    "trunks": "What does each trunk explain?",
    "iterations": "How much value pretraining, and what is it worth once PPO follows?",
    "time": "Does the head need the timestep?",
    "text": "Does the head need the prompt besides the trunk's features?",
    "loss": "Which value loss?",
}
HEAD = """Explained variance of held-out states with the actor frozen, mean over the seeds; the best state of
value pretraining is chosen on other prompts. Floor: what the prompt alone explains. Ceiling: what the state
tells, by branched completions. Score: place of all steps together between floor (0) and ceiling (1). Images:
of value pretraining, those that choose included. Where no trunk is named, the critic is a branch.
With the actor frozen the trunk `joint` is `shared`."""
Row = dict[str, Any]
Rows = list[tuple[Cell, list[Row]]]
"""Cells and what each seed measured."""


def sections(results: Path, pictures: Path) -> list[str]:
    """One section per folder that has the bounds and a whole measure of a seed."""
    found = (_section(study, pictures) for study in units.studies(results / "critics"))
    return [section for section in found if section]


def _section(study: Path, pictures: Path) -> str:
    units_found = units.load(study)
    if units.SETTINGS not in units_found:
        return ""
    settings = units_found[units.SETTINGS]
    preset, scale = branch_preset(settings["backbone"]), Scale(**settings["scale"])
    tables: list[str] = []
    for measure in MEASURES:
        made = list(cells([measure], preset.critic, scale))
        seeds = _seeds(units_found, made)
        if not seeds:
            continue
        rows: Rows = [(cell, [units_found[f"{cell.key}-seed{seed}"] for seed in seeds]) for cell in made]

        lines = ["", f"**{QUESTIONS[measure]}** Seeds: {len(seeds)}.", ""]
        if measure == "trunks":
            picture = pictures / f"critics-{study.name}.png"
            bounds = [units_found[f"bounds-seed{seed}"] for seed in seeds]
            _draw(rows, bounds, picture)
            lines += [f"![explained variance]({pictures.name}/{picture.name})", "", *_by_step(rows, bounds)]
        else:
            lines += list(_summary(rows))
        tables += lines
    return "\n".join([f"## critics, {study.name}", "", HEAD, *tables]) if tables else ""


def _seeds(found: Collection[str], made: Sequence[Cell]) -> list[int]:
    """Seeds that have the bounds and every cell."""
    keys = ["bounds", *(cell.key for cell in made)]
    having = [
        {int(unit.removeprefix(f"{key}-seed")) for unit in found if unit.startswith(f"{key}-seed")}
        for key in keys
    ]
    return sorted(set.intersection(*having))


def _mean(rows: Sequence[Row], name: str) -> np.ndarray:
    """Mean over the seeds, of each step where there are steps."""
    found: np.ndarray = np.asarray([row[name] for row in rows], dtype=float).mean(axis=0)
    return found


def _by_step(rows: Rows, bounds: Sequence[Row]) -> Iterator[str]:
    """A row per trunk, a column per step, between the rows of floor and ceiling."""
    ceiling = _mean(bounds, "ceiling").mean(axis=-1)
    floor = np.full_like(ceiling, _mean(bounds, "floor").mean())
    steps = [f"step {step}" for step in range(len(ceiling))]
    columns = ["trunk", *steps, "score", f"score minus {rows[0][0].name}"]
    columns += ["parameters", "images", "CPU seconds"]
    yield "| " + " | ".join(columns) + " |"
    yield "|" + "---|" * len(columns)
    yield "| floor | " + " | ".join(f"{share:.2f}" for share in floor) + " | 0 | | | | |"
    for cell, found in rows:
        explained = " | ".join(f"{share:.2f}" for share in _mean(found, "explained_variance"))
        parameters = f"{found[0]['parameters']:,} | {found[0]['images']:,}"
        seconds = f"{_mean(found, 'seconds_value_pretraining'):.0f}"
        score = f"{_mean(found, 'overall_score'):.2f} | {_lead(rows, found)}"
        yield f"| {cell.name} | {explained} | {score} | {parameters} | {seconds} |"
    yield "| ceiling | " + " | ".join(f"{share:.2f}" for share in ceiling) + " | 1 | | | | |"


def _summary(rows: Rows) -> Iterator[str]:
    """Early and late half of the steps; what came of PPO where it followed."""
    trained = "rewards" in rows[0][1][0]
    columns = [rows[0][0].measure, "EV early", "EV late", "score", f"score minus {rows[0][0].name}", "images"]
    if trained:
        columns += ["EV in PPO, first", "last", "reward, first", "last", "held-out strict", "images in all"]
    yield "| " + " | ".join(columns) + " |"
    yield "|" + "---|" * len(columns)
    for cell, found in rows:
        explained = _mean(found, "explained_variance")
        middle = len(explained) // 2
        line = [
            cell.name,
            f"{explained[:middle].mean():.3f}",
            f"{explained[middle:].mean():.3f}",
            f"{_mean(found, 'overall_score'):.3f}",
            _lead(rows, found),
            f"{found[0]['images']:,}",
        ]
        if trained:
            variance, rewards = (_mean(found, name) for name in ("explained_variance_training", "rewards"))
            strict = np.mean([row["evaluation"]["shapes_strict"] for row in found])
            line += [f"{share:.3f}" for share in (variance[0], variance[-1], rewards[0], rewards[-1], strict)]
            line += [f"{found[0]['images_in_all']:,}"]
        yield "| " + " | ".join(line) + " |"


def _lead(rows: Rows, found: Sequence[Row]) -> str:
    """Score minus that of the measure's first cell, over the paired seeds."""
    first = rows[0][1]
    if found is first or len(first) < 2:
        return ""
    return paired(*([row["overall_score"] for row in group] for group in (found, first))).text()


def _draw(rows: Rows, bounds: Sequence[Row], path: Path) -> None:
    """Explained variance by step of every trunk, between floor and ceiling."""
    figure, axes = plt.subplots(figsize=(7, 4))
    ceiling = _mean(bounds, "ceiling").mean(axis=-1)
    steps = np.arange(len(ceiling))
    for (cell, found), marker in zip(rows, "osd^vx+*", strict=False):
        axes.plot(steps, _mean(found, "explained_variance"), marker=marker, markersize=4, label=cell.name)
    axes.plot(steps, ceiling, "k--", linewidth=1, label="ceiling")
    axes.axhline(_mean(bounds, "floor").mean(), color="k", linestyle=":", linewidth=1, label="floor")
    axes.set_xlabel("step")
    axes.set_ylabel("explained variance")
    axes.set_ylim(bottom=max(axes.get_ylim()[0], -0.3))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, ncols=2)
    figure.tight_layout()
    save(figure, path)
