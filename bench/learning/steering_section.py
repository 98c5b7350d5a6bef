"""The part of docs/results.md about steering, and its picture."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from statistics import mean
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from bench.learning import units
from bench.learning.analysis import Difference, paired
from bench.learning.figures import save
from bench.learning.steering_arms import BASELINE
from bench.learning.units import Unit

Methods = dict[str, dict[int, Unit]]
"""Method -> seed -> what was measured."""
HEAD = """Does the critic steer better than best of n at the same {budget:g} NFE per image? {source}
Settings of every method are those of the highest reward on {tuning_images} images of tuning prompts; {images}
images of held-out prompts per seed. NFE: forwards plus twice the backwards, per image. V: of the last noisy
state, in standard deviations of the reward."""
COSTS = ("forwards_per_image", "backwards_per_image", "evaluations_per_image")
CHOSEN_BY = {"value": "V", "reward": "the true reward, which costs reward calls"}


def sections(results: Path, pictures: Path) -> list[str]:
    """One section per study that has a seed of every method."""
    found = (_section(study, pictures) for study in units.studies(results / "steering"))
    return [section for section in found if section]


def by_method(found: dict[str, Unit]) -> dict[str, Methods]:
    """Chooser -> method -> seed -> unit; only seeds that every method of the chooser has."""
    choosers: dict[str, Methods] = {}
    for unit in (unit for key, unit in found.items() if "-seed" in key):
        choosers.setdefault(unit["chooser"], {}).setdefault(unit["method"], {})[unit["seed"]] = unit
    whole = {}
    for chooser, methods in choosers.items():
        seeds = sorted(set.intersection(*(set(found) for found in methods.values())))
        if seeds and BASELINE in methods:
            ordered = sorted(methods, key=lambda name: -_score(methods[name][seeds[0]], "shapes_strict"))
            whole[chooser] = {name: {seed: methods[name][seed] for seed in seeds} for name in ordered}
    return whole


def _section(study: Path, pictures: Path) -> str:
    found = units.load(study)
    choosers = by_method(found)
    if not choosers:
        return ""
    settings = found[units.SETTINGS]
    gold = list(settings["gold"])
    picture = pictures / f"steering-{study.name}.png"
    _draw(choosers, gold, picture)
    text = HEAD.format(source=_source(settings["training"]), **settings)
    lines = [f"## steering, {study.name}", "", text, "", f"![scores]({pictures.name}/{picture.name})"]
    for chooser, methods in choosers.items():
        lines += ["", *_table(chooser, methods, settings["reward"], gold)]
    return "\n".join(lines)


def _source(training: dict[str, Any]) -> str:
    if "iterations" not in training:
        return "Saved models, whose training may have had the prompts that choose settings."
    return (
        f"A critic of its own per seed (trunk {training['trunk']}), {training['iterations']} iterations of "
        "training after value pretraining; prompts that train, choose settings and report are disjoint."
    )


def _table(chooser: str, methods: Methods, reward: str, gold: list[str]) -> Iterator[str]:
    seeds = len(methods[BASELINE])
    yield f"The last choice is made by {CHOSEN_BY[chooser]}; paired seeds: {seeds}:"
    yield ""
    columns = ["method", "forwards", "backwards", "NFE", "reward calls", "V", reward, *gold, "diversity"]
    columns += [f"method minus {BASELINE}, {name}" for name in [*gold, "diversity"]]
    yield "| " + " | ".join(columns) + " |"
    yield "|" + "---|" * len(columns)
    for name, runs in methods.items():
        found = list(runs.values())
        cells = [
            name,
            *(f"{mean(unit[key] for unit in found):.1f}" for key in COSTS),
            f"{mean(unit['reward_calls_per_image'] for unit in found):.0f}",
            f"{mean(unit['value'] for unit in found):.2f}",
            *(f"{mean(_score(unit, score) for unit in found):.3f}" for score in [reward, *gold]),
            f"{mean(unit['diversity'] for unit in found):.4f}",
            *(_cell(methods, name, score) for score in [*gold, "diversity"]),
        ]
        yield "| " + " | ".join(cells) + " |"


def _cell(methods: Methods, name: str, score: str) -> str:
    found = difference(methods, name, score)
    digits = 4 if score == "diversity" else 3
    return "" if found is None else found.text(digits)


def difference(methods: Methods, name: str, score: str) -> Difference | None:
    """Method minus best of n over the paired seeds; None for one seed, and for best of n itself."""
    if name == BASELINE or len(methods[BASELINE]) < 2:
        return None
    return paired(*([_score(unit, score) for unit in methods[key].values()] for key in (name, BASELINE)))


def _score(unit: Unit, name: str) -> float:
    return float(unit["diversity"]) if name == "diversity" else mean(unit["scores"][name])


def _draw(choosers: dict[str, Methods], gold: list[str], path: Path) -> None:
    """Gold scores of every method, a point per seed, beside the mean of best of n."""
    figure, grid = plt.subplots(
        len(choosers), len(gold), figsize=(4.5 * len(gold), 3.0 * len(choosers)), squeeze=False, sharex="col"
    )
    for row, (chooser, methods) in zip(grid, choosers.items(), strict=True):
        for axes, score in zip(row, gold, strict=True):
            for height, found in enumerate(reversed(methods.values())):
                scores = [_score(unit, score) for unit in found.values()]
                axes.plot(scores, [height] * len(scores), "o", alpha=0.4, color="tab:blue")
                axes.plot(mean(scores), height, "|", markersize=16, color="tab:blue")
            best_of_n = mean(_score(unit, score) for unit in methods[BASELINE].values())
            axes.axvline(best_of_n, color="tab:gray", linestyle="--", linewidth=1)
            axes.set_yticks(range(len(methods)), list(reversed(methods)), fontsize=8)
            axes.set_title(f"{score}, chosen by {chooser}", fontsize=9)
            axes.grid(alpha=0.3)
        for axes in row[1:]:
            axes.set_yticklabels([])
    figure.tight_layout()
    save(figure, path)
