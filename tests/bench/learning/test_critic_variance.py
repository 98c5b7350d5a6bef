"""Cells of the critics' comparison are measured once, kept at once, and not mixed between scales."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny_backbones import barely_trained

from bench.learning import critic_variance, critics_section, units
from bench.learning.controls import CONTROL_TRUNKS
from bench.learning.critic_variance import ITERATIONS, MEASURES, Cell, cells
from bench.learning.critics import SMOKE
from bench.learning.problems import Materials, Prompts
from bench.learning.study_config import study_config
from lacfast import CriticConfig
from lacfast.config import TRUNKS
from lacfast.records import FirstSampleId
from lacfast.runtime.directories import whole_directory
from lacfast.tasks import scenes
from lacfast.tasks.storage import save_pretrained

BOUNDS = {"floor": [0.2], "ceiling": [[0.5], [1.0]], "images": 8}
NOWHERE = Materials(Path("nowhere"))


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    keys: list[str] = []

    def measure(trainer: Any, cell: Cell, bounds: Any, scale: Any) -> dict[str, Any]:
        keys.append(cell.key)
        share = 0.4 if cell.key == "preset" else 0.3
        row = {"explained_variance": [0.2, share], "overall_score": share, "parameters": 1000}
        row |= {"images": 4, "seconds_value_pretraining": 1.0}
        if cell.measure == "iterations":
            row |= {"explained_variance_training": [0.1, 0.2], "rewards": [0.5, 0.6], "images_in_all": 9}
            row["evaluation"] = {"shapes_strict": 0.45}
        return row

    monkeypatch.setattr(critic_variance, "_trainer", lambda *arguments, **named: None)
    monkeypatch.setattr(critic_variance, "_bounds", lambda trainer, scale: BOUNDS)
    monkeypatch.setattr(critic_variance, "_measure", measure)
    return keys


def test_a_run_goes_on_where_it_stopped_and_begins_nothing_after_its_deadline(
    measured: list[str], tmp_path: Path
) -> None:
    critic_variance.run(NOWHERE, "dit", ["time"], [0], SMOKE, tmp_path / "dit", deadline=0.0)
    assert measured == []
    critic_variance.run(NOWHERE, "dit", ["time"], [0], SMOKE, tmp_path / "dit")
    assert measured == ["preset", "time_conditioning-false"]
    critic_variance.run(NOWHERE, "dit", ["time"], [0, 1], SMOKE, tmp_path / "dit")
    assert measured[2:] == ["preset", "time_conditioning-false"]


def test_cells_of_another_scale_are_not_taken_over(measured: list[str], tmp_path: Path) -> None:
    critic_variance.run(NOWHERE, "dit", ["time"], [0], SMOKE, tmp_path / "dit")
    with pytest.raises(ValueError, match=r"is of other settings \(scale\); choose another --out"):
        critic_variance.run(NOWHERE, "dit", ["time"], [0], replace(SMOKE, batch_size=9), tmp_path / "dit")


def test_the_page_has_a_table_for_every_measure_that_a_seed_has_whole(
    measured: list[str], tmp_path: Path
) -> None:
    study = tmp_path / "critics" / "dit"
    critic_variance.run(NOWHERE, "dit", ["trunks", "iterations", "time"], [0, 1, 2], SMOKE, study)
    # A fourth seed that stopped early is left out.
    units.write(study, "bounds-seed3", BOUNDS)
    (section,) = critics_section.sections(tmp_path, tmp_path / "docs" / "results")
    assert "| floor | 0.20 | 0.20 | 0 |" in section
    assert "| ceiling | 0.50 | 1.00 | 1 |" in section
    assert "| branch | 0.20 | 0.40 | 0.40 |  | 1,000 | 4 | 1 |" in section
    assert "| copy | 0.20 | 0.30 | 0.30 | -0.100 [-0.100, -0.100] behind | 1,000 | 4 | 1 |" in section
    assert "| without | 0.200 | 0.300 | 0.300 | -0.100 [-0.100, -0.100] behind | 4 |" in section
    assert "| 40 | 0.200 | 0.300 | 0.300 | +0.000 [+0.000, +0.000] undecided | 4 | 0.100 | 0.200 |" in section
    assert "value loss" not in section
    assert section.count("Seeds: 3.") == 3
    assert (tmp_path / "docs" / "results" / "critics-dit.png").stat().st_size > 10_000


@pytest.mark.parametrize("preset", [CriticConfig(), study_config("dit").critic])
def test_every_measure_has_cells_of_its_own_and_every_trunk_with_a_critic_is_compared(
    preset: CriticConfig,
) -> None:
    made = list(cells(MEASURES, preset, SMOKE))
    configurations = {cell.key: (cell.critic, cell.iterations) for cell in made}
    assert all(configurations[cell.key] == (cell.critic, cell.iterations) for cell in made)
    # The preset's critic stands in four tables and is trained once.
    assert sum(cell.key == "preset" for cell in made) == 4
    compared = {cell.critic.trunk for cell in made if cell.measure == "trunks"}
    # A joint critic that is pretrained beside a frozen actor is a shared one.
    assert compared == {*TRUNKS, *CONTROL_TRUNKS} - {"none", "joint"}


def test_a_critic_is_chosen_on_tuning_prompts_and_reported_on_held_out_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with whole_directory(tmp_path / "shapes-dit") as target:
        save_pretrained(barely_trained(), target)
    seen: dict[int, set[str]] = {}
    collect = critic_variance.LatentActorCriticTrainer.collect

    def recorded(trainer: Any, prompts: Any, first_id: int, **named: Any) -> Any:
        seen.setdefault(first_id, set()).update(prompts.texts)
        return collect(trainer, prompts, first_id, **named)

    monkeypatch.setattr(critic_variance.LatentActorCriticTrainer, "collect", recorded)
    monkeypatch.setattr(critic_variance, "ITERATIONS", (0, 1))
    study = tmp_path / "critics"
    critic_variance.run(Materials(tmp_path), "dit", ["iterations"], [0], SMOKE, study)
    prompts = Prompts.of(scenes.TASK)
    held_out, tuning = ({prompt.text for prompt in part} for part in (prompts.held_out, prompts.tuning))
    assert seen.pop(critic_variance.REPORT_IDS) == held_out
    assert seen.pop(FirstSampleId.SELECTION) == tuning
    assert all(not texts & (held_out | tuning) for texts in seen.values())
    none, some = (units.load(study)[f"iterations-{count}-seed0"] for count in (0, 1))
    assert none["images"] == 0
    assert some["images"] == SMOKE.held_out_samples + SMOKE.batch_size
    assert none["images_in_all"] == SMOKE.batch_size * SMOKE.train_iterations
    assert some["history"]
    assert math.isfinite(some["overall_score"])
    assert ITERATIONS == (0, 5, 15, 40)
