"""A run in the terminal: how far, how fast, which bars, and every finding with its remedy."""

from __future__ import annotations

import io
import json
import math
import os
import time
from pathlib import Path

import pytest
from refusals import Refusal
from rich.console import Console

from lacfast.cli import main
from lacfast.report.progress import duration, progress
from lacfast.report.serve import RunServer
from lacfast.report.watch import WIDTH, screen, sparkline, watch
from tests.report.test_diagnostics import iteration
from tests.report.test_run import write_run


def shown(directory: Path, width: int = 80) -> str:
    out = io.StringIO()
    watch(directory, interval=1.0, console=Console(file=out, width=width))
    return out.getvalue()


def test_a_run_says_how_far_it_is_how_fast_and_when_it_ends(tmp_path: Path) -> None:
    write_run(tmp_path / "my-run")
    (tmp_path / "my-run" / "run.json").write_text('{"train": {"iterations": 606, "batch_size": 128}}')
    text = shown(tmp_path / "my-run")
    assert "my-run  iteration 6 of 606, 768 images, 42.7 images/s, 30 min" in text.replace("\n", " ")
    for title in ("quality, evaluated", "explained variance", "clipped from above", "denoising steps"):
        assert title in text
    assert "none of the known signatures" in text
    assert max(map(len, text.splitlines())) <= 80


def test_a_finding_stands_with_its_remedy_and_names_are_no_markup(tmp_path: Path) -> None:
    write_run(tmp_path / "run", first_max_abs_log_ratio=1e-3, **{"reward/[red]x[/red]": 1.0})
    text = " ".join(shown(tmp_path / "run").split())
    assert "! The first ratio is not 1 (iteration 1)" in text
    assert "attention backend" in text
    assert "[red]x[/red]" in text


def test_a_finding_stands_above_the_curves_where_a_low_terminal_cuts_nothing(tmp_path: Path) -> None:
    write_run(tmp_path / "run", first_max_abs_log_ratio=1e-3)
    text = shown(tmp_path / "run")
    assert text.index("The first ratio is not 1") < text.index("over the iterations")


def begun(directory: Path) -> Path:
    """A run that has written its settings and no line."""
    directory.mkdir()
    (directory / "run.lock").touch()
    (directory / "run.json").write_text('{"train": {"iterations": 6, "batch_size": 128}}', encoding="utf-8")
    return directory


def test_a_run_without_a_line_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = begun(tmp_path / "run")
    text = " ".join(shown(directory).split())
    assert text == "run has begun and written no line yet: it loads or makes its model"
    write_run(tmp_path / "other")

    def writes(seconds: float) -> None:
        (tmp_path / "other" / "metrics.jsonl").rename(directory / "metrics.jsonl")

    monkeypatch.setattr("lacfast.report.watch.time.sleep", writes)
    out = io.StringIO()
    watch(directory, interval=1.0, console=Console(file=out, width=80, force_terminal=True))
    assert "no line yet" in out.getvalue()
    assert "iteration 6 of 6" in out.getvalue()


def test_a_run_that_died_before_its_first_line_is_told_from_one_that_loads(tmp_path: Path) -> None:
    directory = begun(tmp_path / "run")
    os.utime(directory / "run.lock", (time.time() - 7300, time.time() - 7300))
    assert "for 2 h 1 min: it has ended, or hangs" in " ".join(shown(directory).split())


def test_a_page_that_is_served_waits_for_the_first_iteration(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = begun(tmp_path / "run")
    assert main(["report", str(directory)]) == 2
    Refusal(
        "the run has not finished an iteration",
        cause="A report of a run that has just begun.",
        remedy="lacfast watch shows what it does",
    ).check(capsys.readouterr().err)
    server = RunServer(directory, 0)
    try:
        assert "No iteration is done yet" in server.page()
        write_run(tmp_path / "other")
        (tmp_path / "other" / "metrics.jsonl").rename(directory / "metrics.jsonl")
        assert "6 iterations" in server.page()
    finally:
        server.server_close()


def test_value_pretraining_shows_before_any_iteration(tmp_path: Path) -> None:
    write_run(tmp_path / "run")
    records = [
        {"phase": "value_pretraining", "iteration": number, "explained_variance": [0.1 * number] * 4}
        for number in range(3)
    ]
    console = Console(file=io.StringIO(), width=80)
    console.print(screen(tmp_path / "run", records, {}))
    assert "value pretraining, iteration 3" in console.file.getvalue()  # type: ignore[attr-defined]


def test_a_run_that_ended_in_value_pretraining_is_told(tmp_path: Path) -> None:
    write_run(tmp_path / "run")
    old = time.time() - 7300
    os.utime(tmp_path / "run" / "metrics.jsonl", (old, old))
    record = {"phase": "value_pretraining", "iteration": 0, "explained_variance": [0.1] * 4}
    console = Console(file=io.StringIO(), width=120)
    console.print(screen(tmp_path / "run", [record], {}))
    assert "no line for 2 h 1 min: it has ended, or hangs" in console.file.getvalue()  # type: ignore[attr-defined]


def test_a_run_that_goes_on_does_not_hang_while_it_loads(tmp_path: Path) -> None:
    write_run(tmp_path / "run")
    (tmp_path / "run" / "run.json").write_text('{"train": {"iterations": 606, "batch_size": 128}}')
    old = time.time() - 7300
    os.utime(tmp_path / "run" / "metrics.jsonl", (old, old))
    assert "hangs" in shown(tmp_path / "run", width=200)
    (tmp_path / "run" / "run.lock").touch()
    assert "hangs" not in shown(tmp_path / "run", width=200)


def test_a_run_that_ended_early_has_no_time_left(tmp_path: Path) -> None:
    write_run(tmp_path / "run")
    (tmp_path / "run" / "run.json").write_text('{"train": {"iterations": 606, "batch_size": 128}}')
    metrics = tmp_path / "run" / "metrics.jsonl"
    for seconds, told in ((300, "30 min"), (7300, "no line for 2 h 1 min: it has ended, or hangs")):
        os.utime(metrics, (time.time() - seconds, time.time() - seconds))
        text = " ".join(shown(tmp_path / "run", width=200).split())
        assert told in text
        assert (" left" in text) == (seconds == 300)


def test_a_watched_run_is_shown_until_it_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_run(tmp_path / "run")
    (tmp_path / "run" / "run.json").write_text('{"train": {"iterations": 7, "batch_size": 128}}')

    def goes_on(seconds: float) -> None:
        with (tmp_path / "run" / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(iteration(7, seconds_rollout=1.0, seconds_update=1.0)) + "\n")

    monkeypatch.setattr("lacfast.report.watch.time.sleep", goes_on)
    out = io.StringIO()
    watch(tmp_path / "run", interval=1.0, console=Console(file=out, width=80, force_terminal=True))
    assert "iteration 7 of 7" in out.getvalue()


def test_the_time_that_is_left_needs_settings_and_an_iteration() -> None:
    train = [iteration(number, seconds_rollout=2.0, seconds_update=1.0) for number in (1, 2)]
    assert math.isnan(progress(train, {}).seconds_left)
    assert math.isnan(progress([], {"train": {"iterations": 3}}).images_per_second)
    found = progress(train, {"train": {"iterations": 5, "batch_size": 128}})
    assert (found.seconds_left, found.images_per_second) == (9.0, 128 / 3)
    # Without settings the images of an iteration are what the log's sum grows by.
    assert progress(train, {}).images_per_second == 128 / 3


def test_sparklines_keep_extremes_gaps_and_their_width() -> None:
    assert sparkline([0.0, 1.0, math.nan, 0.5]) == "▁█ ▅"
    assert sparkline([0.5, 0.5]) == "▁▁"
    assert sparkline([0.5], low=0.0, high=1.0) == "▅"
    assert sparkline([math.nan]) == " "
    long = sparkline([float(number) for number in range(1000)])
    assert len(long) == WIDTH
    assert (long[0], long[-1]) == ("▁", "█")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.2, "0 s"), (59, "59 s"), (61, "1 min 1 s"), (12_000, "3 h 20 min"), (90_000, "1 d 1 h")],
)
def test_durations_are_in_two_units(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_what_is_no_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in (["watch"], ["report", "--serve"], ["compare", str(tmp_path)]):
        assert main([*command, str(tmp_path)]) == 2
        printed = capsys.readouterr().err
        assert "holds no metrics.jsonl" in printed or "given twice" in printed


@pytest.mark.parametrize(
    ("text", "why"), [("{", "Expecting property name"), ("[]", "holds a list")], ids=["no JSON", "a list"]
)
def test_settings_of_something_else_are_refused(text: str, why: str, tmp_path: Path) -> None:
    write_run(tmp_path / "run")
    (tmp_path / "run" / "run.json").write_text(text, encoding="utf-8")
    with Refusal(
        "run.json does not hold a run's settings",
        cause="A run.json that a run did not write.",
        remedy="take it away, or give another directory",
    ).raised() as caught:
        shown(tmp_path / "run")
    assert why in str(caught.value)


def test_a_port_without_a_server_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path), "--port", "81"]) == 2
    Refusal(
        "port=81 would be ignored",
        cause="A port of `lacfast report` that nothing listens on.",
        remedy="add --serve",
    ).check(capsys.readouterr().err)
