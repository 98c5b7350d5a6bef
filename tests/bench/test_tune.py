"""Tuning: which launch is chosen and what is written, with a timer that is made up."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench import tune
from bench.workloads import WORKLOADS
from lacfast.kernels import launch

FAST, SLOW = (1024, 2, 4), (512, 1, 4)


def test_fastest_candidate_wins() -> None:
    assert tune.choose({FAST: 1.0, SLOW: 2.0}, current=SLOW) == FAST


def test_noise_does_not_change_a_launch() -> None:
    assert tune.choose({FAST: 1.0, SLOW: 1.01}, current=SLOW) == SLOW


def test_a_candidate_that_does_not_run_is_never_chosen() -> None:
    assert tune.choose({FAST: 1.0, SLOW: math.inf}, current=SLOW) == FAST
    with pytest.raises(ValueError, match="no candidate runs"):
        tune.choose({FAST: math.inf, SLOW: math.inf}, current=SLOW)


def test_rows_cover_every_size_and_neighbours_merge() -> None:
    def score(op: str, elements: int, candidate: tune.Candidate) -> float:
        best = SLOW if elements <= 4096 else FAST
        return 1.0 if candidate == best else 2.0

    rows = tune.tune("gaussian_step", score)
    assert rows is not None
    assert [(row.elements, row.shape) for row in rows] == [(4096, SLOW), (2**31, FAST)]
    assert all(row.measured for row in rows)


def test_open_bucket_is_timed_at_a_size_that_fits() -> None:
    sizes = set()

    def score(op: str, elements: int, candidate: tune.Candidate) -> float:
        sizes.add(elements)
        return 1.0

    tune.tune("gaussian_step", score)
    assert max(sizes) == tune.LARGEST_TIMED
    assert len(sizes) == len(tune.BUCKETS)


def test_an_unfinished_op_keeps_its_table() -> None:
    assert tune.tune("gaussian_step", lambda *_: 1.0, expired=lambda: True) is None


def test_a_part_goes_on_with_the_sizes_that_were_timed() -> None:
    known: dict[int, tune.Candidate] = {}
    timed: list[int] = []
    kept: list[int] = []

    def score(op: str, elements: int, candidate: tune.Candidate) -> float:
        timed.append(elements)
        return float(candidate != FAST)

    stop_at = tune.BUCKETS[2]
    settings = {"known": known, "on_chosen": lambda: kept.append(len(known))}
    assert tune.tune("gaussian_step", score, expired=lambda: stop_at in timed, **settings) is None
    assert list(known) == list(tune.BUCKETS[:2])
    assert kept == [1, 2]
    timed.clear()
    rows = tune.tune("gaussian_step", score, **settings)
    assert rows == [launch.Launch(2**31, *FAST, measured=True)]
    assert not set(timed) & set(tune.BUCKETS[:2])


class Timer:
    """A clock that every candidate moves by a second."""

    def __init__(self) -> None:
        self.now = 0.0

    def score(self, op: str, elements: int, candidate: tune.Candidate) -> float:
        self.now += 1
        return float(candidate != FAST)


def test_command_is_resumed_until_all_is_timed(
    cuda: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    timer, out, table = Timer(), tmp_path / "tuned.json", tmp_path / "launches.json"
    monkeypatch.setattr(tune, "gpu_score", lambda device: timer.score)
    monkeypatch.setattr(tune, "time", SimpleNamespace(monotonic=lambda: timer.now))
    part = ["--ops", "normal_noise", "--out", str(out), "--table", str(table), "--seconds", "100"]
    assert tune.main(part) == 1
    assert "--resume goes on" in capsys.readouterr().err
    assert not table.exists()
    parts = 1
    while tune.main([*part, "--resume"]) == 1:
        parts += 1
        assert parts < 10
    found = json.loads(out.read_text(encoding="utf-8"))
    assert list(map(int, found["chosen"]["normal_noise"])) == list(tune.BUCKETS)
    assert found["rows"]["normal_noise"] == json.loads(table.read_text())["normal_noise"]["sm_90"]
    # Nothing was timed twice but what a part's end cut off.
    candidates = len(launch.candidates("normal_noise"))
    assert timer.now <= (len(tune.BUCKETS) + parts) * (candidates + 1)
    monkeypatch.setattr(tune.machine, "label", lambda device: "another")
    assert tune.main([*part, "--resume"]) == 2
    assert "has another machine" in capsys.readouterr().err
    assert tune.main(["--resume"]) == 2
    assert "pass an existing --out, not None" in capsys.readouterr().err


def test_forced_launch_is_what_kernels_pick_and_goes_away() -> None:
    before = launch.pick_launch("gaussian_step", 5000, "sm_90")
    with tune.forced("gaussian_step", "sm_90", (256, 8, 2)):
        assert launch.pick_launch("gaussian_step", 5000, "sm_90") == (256, 8, 2, 3)
    assert launch.pick_launch("gaussian_step", 5000, "sm_90") == before
    assert (
        json.loads(launch.LAUNCHES.read_text())["gaussian_step"].keys()
        == launch.table("gaussian_step").keys()
    )


def test_rows_survive_the_file(tmp_path: Path) -> None:
    path = tmp_path / "launches.json"
    rows = tune.tune("gaussian_step", lambda op, elements, candidate: float(candidate != FAST))
    assert rows is not None
    launch.write("gaussian_step", "sm_90", rows, path)
    written = json.loads(path.read_text())["gaussian_step"]["sm_90"]
    assert written == [{"elements": 2**31, "block": 1024, "blocks": 2, "num_warps": 4, "measured": True}]


def test_every_tunable_table_has_a_workload_that_runs_alone() -> None:
    assert {"gaussian_step", "normal_noise", "ppo_loss"} <= set(tune.tunable())
    for op in tune.tunable():
        entry = WORKLOADS[tune.workload_of(op)]
        case = tune.LatentCase("tuning", 2, (512,))
        workload = tune.only_ours(entry.build(case, torch.float32, torch.device("cpu"), compiled=False))
        (call,) = workload.providers.values()
        assert all(result.isfinite().all() for result in call(workload.inputs))


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
def test_command_says_what_it_lacks(capsys: pytest.CaptureFixture[str]) -> None:
    assert tune.main([]) == 2
    assert "CUDA device" in capsys.readouterr().err
