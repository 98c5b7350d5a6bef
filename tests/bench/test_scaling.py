"""The script of strong scaling times what it says."""

from __future__ import annotations

import json

import pytest

from bench import scaling


def test_a_speed_up_is_the_median_of_the_ratios_within_rounds(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seconds = iter([6.0, 4.0, 9.0, 5.0, 3.0, 2.0])
    monkeypatch.setattr(scaling, "measured", lambda processes: next(seconds))
    scaling.main(["--rounds", "3"])
    assert json.loads(capsys.readouterr().out)["speed-up"] == {"1": 1.0, "2": 1.5}


def test_one_process_measures_an_iteration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling, "BATCH", 8)
    monkeypatch.setattr(scaling, "ITERATIONS", 1)
    seconds = scaling.seconds_per_iteration()
    assert seconds is not None
    assert seconds > 0
