"""Runs over one another: their curves where each has them, and the settings that differ."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from http.client import HTTPConnection
from pathlib import Path
from threading import Thread

import pytest
from refusals import Refusal

from lacfast.cli import main
from lacfast.report.compare import Run, curves, differences, places, unique_names, write_comparison
from lacfast.report.serve import HOST, RunServer
from tests.report.test_diagnostics import evaluation, iteration
from tests.report.test_run import write_run


def run(name: str, **settings: object) -> Run:
    train = [iteration(number, seconds_rollout=1800.0, seconds_update=1800.0) for number in (1, 2)]
    return Run(name, [evaluation(0), *train, evaluation(2)], {"train": settings})


def test_only_settings_that_differ_are_shown() -> None:
    found = differences([run("a", seed=1, rate=0.1), run("b", seed=2, rate=0.1), run("c", seed=1, extra=3)])
    assert found == {
        "train.seed": ["1", "2", "1"],
        "train.rate": ["0.1", "0.1", ""],
        "train.extra": ["", "", "3"],
    }


def test_records_stand_where_their_iteration_does_on_every_axis() -> None:
    only = run("a")
    assert places(only, only.records, "iterations") == [0, 1, 2, 2]
    assert places(only, only.records, "images") == [0, 128, 256, 256]
    assert places(only, only.records, "hours") == [0, 1, 2, 2]


def test_a_curve_is_shown_where_one_of_the_runs_has_it() -> None:
    names = [curve.title for curve in curves([run("a"), run("b")])]
    assert "quality, evaluated" in names
    assert "quality, own images" in names
    assert "KL per iteration" not in names


def test_runs_of_one_name_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    assert unique_names([tmp_path / "x" / "run", tmp_path / "y" / "run"]) == ["x/run", "y/run"]
    with pytest.raises(ValueError, match="given twice"):
        unique_names([tmp_path, tmp_path])


@pytest.mark.parametrize(
    "refused",
    [
        Refusal(
            "1 runs cannot be compared",
            cause="A comparison of one run, or of more than have colours of their own.",
            remedy="give 2 to 6 directories",
        )
    ],
)
def test_one_run_is_not_compared(refused: Refusal, tmp_path: Path) -> None:
    with refused.raised():
        write_comparison([tmp_path], tmp_path / "page.html")


def test_the_command_writes_the_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "a", evaluations=0)
    write_run(tmp_path / "b", evaluations=0)
    (tmp_path / "b" / "run.json").write_text(json.dumps({"train": {"seed": 4}}))
    assert main(["compare", *(str(tmp_path / name) for name in "ab"), "--out", str(tmp_path / "c.html")]) == 0
    text = (tmp_path / "c.html").read_text(encoding="utf-8")
    assert "<code>train.seed</code>" in text
    assert 'class="run-1"' in text
    assert "c.html" in capsys.readouterr().out


def test_a_reader_that_leaves_is_no_error_but_a_fault_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path / "run", evaluations=0)
    with RunServer(tmp_path / "run", 0) as server:
        for fault in (BrokenPipeError("left"), RuntimeError("broken")):
            try:
                raise fault
            except (OSError, RuntimeError):
                server.handle_error(None, (HOST, 1))
    told = capsys.readouterr().err
    assert "broken" in told
    assert "left" not in told


def test_the_server_answers_this_machine_alone(tmp_path: Path) -> None:
    write_run(tmp_path / "run", evaluations=0)
    server = RunServer(tmp_path / "run", 0)
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        with urllib.request.urlopen(server.address) as answer:
            assert "script-src 'nonce-" in answer.headers["Content-Security-Policy"]
            assert "<script nonce=" in answer.read().decode()
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(f"{server.address}metrics.jsonl")
        # A browser leaves port 80 out.
        for host, status in ((f"evil.example:{server.server_port}", 403), ("evil.example", 403), (HOST, 200)):
            asked = HTTPConnection(HOST, server.server_port)
            asked.request("GET", "/stamp", headers={"Host": host})
            assert asked.getresponse().status == status
            asked.close()
        with Refusal(
            "cannot be used: Address already in use",
            cause="A port that another program has.",
            remedy="choose another, or 0",
        ).raised():
            RunServer(tmp_path / "run", server.server_port)
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
