"""The part of docs/results.md about the noise of the policy's gradient under every baseline."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from bench.learning import units
from bench.learning.units import Unit

FIRST = "nothing"
REFERENCE = "critic"
NEEDED = "signal equals noise at"
"""Trajectories over which a gradient's noise has the length of its expectation."""
HEAD = """How much of the policy's gradient is noise, and what does each baseline take away? Problem
`{problem}`, by {objective}, seeds: {seeds}. At fixed weights, {trajectories:,} new trajectories of prompts
that train: the gradient's variance per trajectory, as a share of that under the plain reward, of each trained
step and of all together. The critic has had {pretraining} rollouts of value pretraining, and those of PPO
where there is PPO; "rollout" compares with all other trajectories that are measured. {expected}: alignment is
the cosine to the gradient of R - V, left out where either signal is below twice its error, as are the
trajectories at which the gradient of all steps has as much signal as noise."""
OBJECTIVES = {
    "ppo": ("PPO", "Baselines leave the expected gradient as it is, GAE below 1 does not"),
    "nft": ("DiffusionNFT", "Baselines change the expected gradient of this loss (section climb)"),
}
"""Objective -> its name, and what baselines do to its expected gradient."""


def sections(results: Path) -> list[str]:
    """One section per study that has a measurement."""
    return [_section(*study) for study in units.measured(results / "gradients")]


def _section(name: str, settings: Unit, found: dict[str, Unit]) -> str:
    scale, objective = settings["scale"], settings.get("objective", "ppo")
    stages = {
        stage: [unit for key, unit in found.items() if key.startswith(f"{stage}-seed")]
        for stage in scale["stages"]
    }
    title, expected = OBJECTIVES[objective]
    head = HEAD.format(
        problem=settings["problem"],
        objective=title,
        expected=expected,
        seeds=max(map(len, stages.values())),
        trajectories=next(iter(found.values()))["trajectories"],
        pretraining=scale["pretraining"],
    )
    lines = [f"## gradients, {name}", "", head]
    for stage, measured in stages.items():
        if measured:
            lines += [
                "",
                f"{_title(scale['stages'][stage])} {_signal(measured)}",
                "",
                *_table(measured, objective),
            ]
    return "\n".join(lines)


def _title(images: int) -> str:
    return f"**After {images:,} images of PPO.**" if images else "**The base model.**"


def _signal(measured: Sequence[Unit]) -> str:
    """The noise scale, or the least that it can be."""
    signal, error, noise = (mean(_whole(unit, REFERENCE)[name] for unit in measured) for name in _NUMBERS)
    within = mean(unit["variance"]["within prompt"] / unit["variance"]["all"] for unit in measured)
    error /= len(measured) ** 0.5
    share = f"{within:.0%} of the reward's variance lies between images of one prompt."
    if signal < 2 * error:
        least = noise / (max(signal, 0.0) + 2 * error)
        found = f"With the critic's advantages signal equals noise at more than {least:,.0f} trajectories"
        return f"{found}, since the signal is below twice its error. {share}"
    least = noise / (signal + 2 * error)
    found = f"With the critic's advantages signal equals noise at {noise / signal:,.0f} trajectories"
    return f"{found}, {least:,.0f} were the signal two errors larger. {share}"


_NUMBERS = ("signal", "error", "noise")


def _whole(unit: Unit, name: str) -> dict[str, Any]:
    found: dict[str, Any] = unit["noise"][name][-1]
    return found


def _table(measured: Sequence[Unit], objective: str) -> Iterator[str]:
    names, steps = list(measured[0]["noise"]), len(measured[0]["noise"][FIRST])
    columns = ["baseline", *(f"trained step {step}" for step in range(steps - 1)), "all", "alignment", NEEDED]
    yield "| " + " | ".join(columns) + " |"
    yield "|" + "---|" * len(columns)
    for name in names:
        shares = [
            mean(_noise(unit, name, step) / _noise(unit, FIRST, step) for unit in measured)
            for step in range(steps)
        ]
        moves = "lambda" in name if objective == "ppo" else name != REFERENCE
        aligned = _aligned(measured, name) if moves else ""
        cells = [name, *(f"{share:.2f}" for share in shares), aligned, _needed(measured, name)]
        yield "| " + " | ".join(cells) + " |"


def _noise(unit: Unit, name: str, step: int) -> float:
    return float(unit["noise"][name][step]["noise"])


def _needed(measured: Sequence[Unit], name: str) -> str:
    signal, error, noise = (mean(_whole(unit, name)[number] for unit in measured) for number in _NUMBERS)
    return f"{noise / signal:,.0f}" if signal > 2 * error / len(measured) ** 0.5 else ""


def _aligned(measured: Sequence[Unit], name: str) -> str:
    whole = [_whole(unit, name) for unit in measured]
    both = [*whole, *(_whole(unit, REFERENCE) for unit in measured)]
    is_seen = all(each["signal"] > 2 * each["error"] for each in both)
    return f"{mean(each['alignment'] for each in whole):.2f}" if is_seen else ""
