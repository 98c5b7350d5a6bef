"""The script of strong scaling times what it says."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from bench import scaling
from lacfast.runs.recipes import recipe


def test_a_speed_up_is_the_median_of_the_ratios_within_rounds(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    seconds = iter([6.0, 4.0, 9.0, 5.0, 3.0, 2.0])
    monkeypatch.setattr(scaling, "measured", lambda processes: scaling.Iteration(next(seconds)))
    monkeypatch.setattr(scaling, "RESULT", tmp_path / "scaling.json")
    scaling.main(["--rounds", "3"])
    found = json.loads(scaling.RESULT.read_text(encoding="utf-8"))
    assert found["strong"]["speed-up"] == {"1": 1.0, "2": 1.5}
    written = capsys.readouterr().out.strip()
    assert written == scaling.strong_text(found)
    assert "2 are 1.50 times as fast as 1 (" in written


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--paper", "--apart"], "not allowed with"),
        (["--apart", "--processes", "1", "4"], "not allowed with"),
        (["--paper", "--rounds", "3"], "--rounds would be ignored"),
        (["--processes", "2"], "at least one other number"),
        (["--rounds", "0"], "measures nothing"),
    ],
)
def test_an_option_that_would_be_ignored_is_refused(
    arguments: list[str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        scaling.main(arguments)
    assert reason in capsys.readouterr().err


def test_one_process_measures_an_iteration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling, "BATCH", 8)
    monkeypatch.setattr(scaling, "WARM_UP", 1)
    monkeypatch.setattr(scaling, "ITERATIONS", 1)
    found = scaling.iteration()
    assert found is not None
    assert found.seconds > 0
    assert found.waited == 0


def test_the_overlap_is_what_neither_waits(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    both, one = scaling.Iteration(4.0), scaling.Iteration(5.0, waited=0.5, samplers_waited=2.0)
    monkeypatch.setattr(scaling, "measured", lambda _, rollout_ranks=0: one if rollout_ranks else both)
    monkeypatch.setattr(scaling, "RESULT", tmp_path / "scaling.json")
    scaling.main(["--apart", "--rounds", "2"])
    found = json.loads(scaling.RESULT.read_text(encoding="utf-8"))["apart"]["found"]
    assert (found["speed-up"], found["overlap"]) == (0.8, 0.5)
    assert "at a time for 50% of an iteration" in capsys.readouterr().out


def test_the_table_has_the_recipes_on_as_many_gpus_as_their_batch_has_images(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = SimpleNamespace(efficiency=1.0, gradient_bytes=0.0, gathered_bytes=2e9)
    monkeypatch.setattr(scaling, "plan", lambda config, ranks: SimpleNamespace(on=lambda gpus: found))
    monkeypatch.setattr(scaling, "ON_PAPER", ("flux-pickscore",))
    head, _, *rows = scaling.paper_table({"paper": scaling.paper()}).splitlines()
    assert head.endswith(
        "| 8 GPUs | 16 GPUs | 32 GPUs | 64 GPUs | 128 GPUs | 256 GPUs | 512 GPUs | 1,024 GPUs |"
    )
    assert rows == ["| `flux-pickscore` | 48 | 2.0 GB | 100.0% | 100.0% | 100.0% |  |  |  |  |  |"]


RECORDED = json.loads(scaling.RESULT.read_text(encoding="utf-8"))


def test_the_recorded_table_has_its_recipes_with_their_batches() -> None:
    batches = {name: recipe(name).train.batch_size for name in scaling.ON_PAPER}
    assert {name: row["batch"] for name, row in RECORDED["paper"].items()} == batches


@pytest.mark.slow
@pytest.mark.parametrize("name", RECORDED["paper"])
def test_the_recorded_table_is_what_recipes_cost_today(name: str) -> None:
    assert scaling.on_paper(recipe(name)) == RECORDED["paper"][name]
