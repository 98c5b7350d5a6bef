"""The script of strong scaling times what it says."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from bench import scaling
from lacfast.runs.recipes import recipes


def test_a_speed_up_is_the_median_of_the_ratios_within_rounds(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seconds = iter([6.0, 4.0, 9.0, 5.0, 3.0, 2.0])
    monkeypatch.setattr(scaling, "measured", lambda processes: scaling.Iteration(next(seconds)))
    scaling.main(["--rounds", "3"])
    assert json.loads(capsys.readouterr().out)["speed-up"] == {"1": 1.0, "2": 1.5}


def test_one_process_measures_an_iteration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling, "BATCH", 8)
    monkeypatch.setattr(scaling, "WARM_UP", 1)
    monkeypatch.setattr(scaling, "ITERATIONS", 1)
    found = scaling.iteration()
    assert found is not None
    assert found.seconds > 0
    assert found.waited == 0


def test_the_overlap_is_what_neither_waits(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    both, one = scaling.Iteration(4.0), scaling.Iteration(5.0, waited=0.5, samplers_waited=2.0)
    monkeypatch.setattr(scaling, "measured", lambda _, rollout_ranks=0: one if rollout_ranks else both)
    scaling.main(["--apart", "--rounds", "2"])
    found = json.loads(capsys.readouterr().out)
    assert (found["speed-up"], found["overlap"]) == (0.8, 0.5)


def test_the_table_has_the_recipes_on_as_many_gpus_as_their_batch_has_images(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = SimpleNamespace(efficiency=1.0, gradient_bytes=0.0, gathered_bytes=2e9)
    monkeypatch.setattr(scaling, "plan", lambda config, ranks: SimpleNamespace(on=lambda gpus: found))
    known = {name: recipes()[name] for name in ("shapes", "flux-pickscore")}
    monkeypatch.setattr(scaling, "recipes", lambda: known)
    head, _, *rows = scaling.paper().splitlines()
    assert head.endswith(
        "| 8 GPUs | 16 GPUs | 32 GPUs | 64 GPUs | 128 GPUs | 256 GPUs | 512 GPUs | 1,024 GPUs |"
    )
    assert rows == ["| `flux-pickscore` | 48 | 2.0 GB | 100.0% | 100.0% | 100.0% |  |  |  |  |  |"]
