"""Cells of the critics' comparison are measured once, kept at once, and not mixed between scales."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bench import critic_variance
from bench.critic_trunks import SMOKE
from bench.critic_variance import Cell, cells, table
from lacfast import CriticConfig
from lacfast.config import TRUNKS

BOUNDS = {"floor": [0.2], "ceiling": [[0.5], [1.0]], "images": 8}


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    keys: list[str] = []

    def measure(trainer: Any, cell: Cell, bounds: Any, scale: Any) -> dict[str, Any]:
        keys.append(cell.key)
        row = {"explained_variance": [0.2, 0.6], "overall_score": bounds.overall_score(bounds.ceiling / 2)}
        return row | {"images": 4, "seconds_value_pretraining": 1.0}

    monkeypatch.setattr(critic_variance, "_trainer", lambda *arguments: None)
    monkeypatch.setattr(critic_variance, "_bounds", lambda trainer: BOUNDS)
    monkeypatch.setattr(critic_variance, "_measure", measure)
    return keys


def test_a_run_goes_on_where_it_stopped(measured: list[str], tmp_path: Path) -> None:
    out = tmp_path / "critics.json"
    critic_variance.run(Path("pretrained"), "dit", ["time"], [0], SMOKE, out)
    assert measured == ["time/on/0", "time/off/0"]
    stored = critic_variance.run(Path("pretrained"), "dit", ["time"], [0, 1], SMOKE, out)
    assert measured[2:] == ["time/on/1", "time/off/1"]
    assert table(stored)[2] == "| time/on | 2 | 0.200 | 0.600 | 0.318 | 4 | 1 |"


def test_cells_of_another_scale_are_not_taken_over(measured: list[str], tmp_path: Path) -> None:
    out = tmp_path / "critics.json"
    critic_variance.run(Path("pretrained"), "dit", ["time"], [0], SMOKE, out)
    with pytest.raises(ValueError, match=r"critics\.json was measured with .* name another file"):
        critic_variance.run(
            Path("pretrained"), "dit", ["time"], [0], replace(SMOKE, batch_size=9), tmp_path / "critics.json"
        )


def test_every_measure_has_cells_of_its_own_and_every_trunk_with_a_critic_is_compared() -> None:
    made = list(cells(critic_variance.MEASURES, [0, 1], CriticConfig(), SMOKE))
    assert len({cell.key for cell in made}) == len(made)
    compared = {cell.critic.trunk for cell in made if cell.measure == "trunks"}
    # A joint critic that is pretrained beside a frozen actor is a shared one.
    assert compared == set(TRUNKS) - {"none", "joint"}
