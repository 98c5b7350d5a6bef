"""The part of docs/results.md about what the gradient under every baseline is good for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import mean

from bench.learning import units
from bench.learning.units import Unit

HEAD = """Which gradient climbs? Problem `{problem}`, DiffusionNFT, seeds: {seeds}. The base model's weights
move by {length:.2%} of their norm along the gradient of {trajectories:,} trajectories of the prompts that
train, of each noise level alone (0 is the noisiest) and of all; the table has the change of the mean reward,
{reward:.3f} before, of {judged:,} images of other prompts, with its standard error. "value" is what the
critic takes out of the gradient: that with R - V is the group's less this one."""


def sections(results: Path) -> list[str]:
    """One section per study that has a measurement."""
    return [_section(*study) for study in units.measured(results / "climb")]


def _section(name: str, settings: Unit, found: dict[str, Unit]) -> str:
    measured = list(found.values())
    head = HEAD.format(
        problem=settings["problem"],
        seeds=len(measured),
        length=settings["length"],
        trajectories=measured[0]["trajectories"],
        reward=mean(unit["reward"] for unit in measured),
        judged=settings["judged"],
    )
    return "\n".join([f"## climb, {name}", "", head, "", *_table(measured)])


def _table(measured: Sequence[Unit]) -> Iterator[str]:
    names, levels = list(measured[0]["rise"]), len(next(iter(measured[0]["rise"].values()))) - 1
    columns = ["baseline", *(f"level {level}" for level in range(levels)), "all"]
    yield "| " + " | ".join(columns) + " |"
    yield "|" + "---|" * len(columns)
    for name in names:
        cells = [_cell([unit["rise"][name][level] for unit in measured]) for level in range(levels + 1)]
        yield "| " + " | ".join([name, *cells]) + " |"


def _cell(rises: Sequence[dict[str, float]]) -> str:
    error = sum(rise["error"] ** 2 for rise in rises) ** 0.5 / len(rises)
    return f"{mean(rise['mean'] for rise in rises):+.3f} ({error:.3f})"
