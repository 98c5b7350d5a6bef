"""Seconds of runs whose old policy ran on every state are noted as those of today, once."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_backbones import barely_trained

from bench.learning import claim_arms, old_outputs, runs, units
from bench.learning.problems import PROBLEMS, Materials
from bench.learning.runs import Point
from lacfast.runtime.directories import whole_directory
from lacfast.tasks.storage import save_pretrained


def test_the_old_policy_s_share_of_an_iteration_is_measured(tmp_path: Path) -> None:
    with whole_directory(tmp_path / "shapes-dit") as target:
        save_pretrained(barely_trained(), target)
    found = old_outputs.measure("dit", Materials(tmp_path), repeats=1)
    assert 0 < found["iteration"] < found["at_every_state"]
    assert found["factor"] == pytest.approx(found["iteration"] / found["at_every_state"], abs=1e-3)


def test_an_iteration_as_it_was_learns_the_same(tmp_path: Path) -> None:
    with whole_directory(tmp_path / "shapes-dit") as target:
        save_pretrained(barely_trained(), target)
    arm = claim_arms.forward_process("dit")["DiffusionNFT"]
    today, before = (
        runs.trainer_of(PROBLEMS["shapes"], "dit", arm, Materials(tmp_path), seed=0) for _ in range(2)
    )
    expected = today.train_iteration()["policy_loss"]
    with old_outputs._everywhere(before):
        assert before.train_iteration()["policy_loss"] == pytest.approx(expected, rel=1e-5)


def test_the_factor_is_noted_in_recorded_runs_without_a_critic(tmp_path: Path) -> None:
    study, points = tmp_path / "glyphs-nft" / "unet", [Point(8, 0, 10.0, {"glyphs": 0.5})]
    made_today = runs.described(points, seed=1)
    recorded = {name: value for name, value in made_today.items() if name != "seconds_factor"}
    units.write(study, "diffusionnft-seed0", recorded)
    units.write(study, "diffusionnft-seed1", made_today)
    units.write(study, "critic-weighted-nft-seed0", recorded)
    assert old_outputs.note(tmp_path, "unet", 0.8) == 1
    assert old_outputs.note(tmp_path, "unet", 0.5) == 0
    seconds = {key: runs.curve(unit)[0].seconds for key, unit in units.load(study).items()}
    assert seconds == {
        "diffusionnft-seed0": 8.0,
        "diffusionnft-seed1": 10.0,
        "critic-weighted-nft-seed0": 10.0,
    }


def test_the_page_tells_the_factors(tmp_path: Path) -> None:
    assert old_outputs.told(tmp_path) == ""
    for backbone, factor in (("dit", 0.86), ("unet", 0.9)):
        units.write(tmp_path / old_outputs.STUDY / backbone, old_outputs.KEY, {"factor": factor})
    assert "those measured times 0.86 (dit) and 0.90 (unet): when" in old_outputs.told(tmp_path)
