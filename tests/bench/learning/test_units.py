"""Units of a study are kept whole, once and together; settings are named by what they change."""

from __future__ import annotations

import json
import multiprocessing
import os
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from bench.learning import units
from bench.learning.study_config import study_config
from lacfast.config import CriticConfig, TrainConfig


@dataclass(frozen=True)
class _Inner:
    rate: float = 0.1


@dataclass(frozen=True)
class _InnerLater:
    rate: float = 0.1
    new: int = 1


@dataclass(frozen=True)
class _Outer:
    inner: _Inner | _InnerLater = field(default_factory=_Inner)
    count: int = 3


@dataclass(frozen=True)
class _OuterLater(_Outer):
    inner: _Inner | _InnerLater = field(default_factory=_InnerLater)
    other: str = "a"


def test_only_what_differs_counts_at_any_depth() -> None:
    assert units.changed(_Outer()) == {}
    assert units.changed(_Outer(_Inner(0.2))) == {"inner": {"rate": 0.2}}
    assert units.changed(_OuterLater(_InnerLater(0.2))) == units.changed(_Outer(_Inner(0.2)))
    assert units.changed(_OuterLater(other="b")) == {"other": "b"}


def test_every_setting_of_a_run_changes_its_name() -> None:
    preset = study_config("dit")
    other = replace(preset, critic=replace(preset.critic, hidden_dim=64))
    names = {units.digest(units.changed(config)) for config in (preset, other, TrainConfig())}
    assert len(names) == 3
    # What a configuration sets by itself is no difference.
    assert units.changed(TrainConfig(critic=CriticConfig())) == {}


def test_a_unit_that_was_begun_by_a_living_process_is_left_to_it(tmp_path: Path) -> None:
    study, key = tmp_path / "dit", "tuning/grpo-0.5"
    assert units.begin(study, key)
    assert not units.begin(study, key)
    units.mark(study, key).write_text("999999999")
    assert units.begin(study, key), "its process is gone"
    units.mark(study, key).write_text(f"{os.getpid()} another-start-of-the-machine/77")
    assert units.begin(study, key), "its number belongs to another process now"
    assert units.done(study, key, lambda: {"score": 1.0}) is None, "this process is at it"


def test_a_unit_is_worked_out_once(tmp_path: Path) -> None:
    study, calls = tmp_path / "dit", []

    def work() -> units.Unit:
        calls.append(1)
        return {"score": 0.1 + 0.2}

    assert [units.done(study, "grpo-seed0", work) for _ in range(2)] == [{"score": 0.1 + 0.2}] * 2
    assert calls == [1]
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [tmp_path / "dit.json"]


def test_a_unit_that_fails_can_be_begun_again(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        units.done(tmp_path / "dit", "grpo-seed0", lambda: {"score": 1 / 0})
    assert units.done(tmp_path / "dit", "grpo-seed0", lambda: {"score": 1.0}) == {"score": 1.0}


def test_a_unit_of_a_process_that_died_before_merging_is_found_and_merged_by_the_next(tmp_path: Path) -> None:
    study = tmp_path / "dit"
    units.write(study, "b", {"score": 2})
    units.dump(study / "tuning" / "a.json", '{"score": 1}')
    assert units.studies(tmp_path) == [study]
    assert units.load(study) == {"b": {"score": 2}, "tuning/a": {"score": 1}}
    units.write(study, "c", {"score": 3})
    assert json.loads((tmp_path / "dit.json").read_text()).keys() == {"b", "c", "tuning/a"}
    assert not list(study.rglob("*.json"))


def _write_twenty(study: Path, name: str) -> None:
    for number in range(20):
        units.write(study, f"{name}{number}", {"score": number})


def test_processes_that_write_at_once_lose_nothing(tmp_path: Path) -> None:
    study = tmp_path / "dit"
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_write_twenty, args=(study, name)) for name in "ab"]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert len(units.load(study)) == len(json.loads((tmp_path / "dit.json").read_text())) == 40


def test_units_of_other_settings_are_not_taken_over(tmp_path: Path) -> None:
    units.require_settings(tmp_path / "dit", {"budget": 40, "gold": ("a", "b")})
    units.require_settings(tmp_path / "dit", {"budget": 40, "gold": ("a", "b")})
    with pytest.raises(ValueError, match=r"of other settings \(budget\); choose another --out"):
        units.require_settings(tmp_path / "dit", {"budget": 20, "gold": ("a", "b")})
