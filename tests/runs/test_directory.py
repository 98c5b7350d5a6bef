"""The directory of a run holds that run alone, and only names of ours are taken for ours."""

from __future__ import annotations

from pathlib import Path

import pytest
from refusals import Refusal

from lacfast.cli import main
from lacfast.report.run import write_run_report
from lacfast.runs.directory import DEMO, EVALUATION, RUN, STEERED, require_own
from lacfast.runs.endings import USAGE


@pytest.mark.parametrize(
    ("name", "refusal"),
    [
        (
            "summary.json",
            Refusal(
                "holds a demo, with which a run of lacfast train would mix",
                cause="`lacfast train --out` names a demo's directory.",
                remedy="choose another --out",
            ),
        ),
        (
            "lacfast-manifest.json",
            Refusal(
                "holds a saved model, with which a run of lacfast train would mix",
                cause="`lacfast train --out` names a checkpoint or a pipeline.",
                remedy="choose another --out",
            ),
        ),
    ],
)
def test_a_run_does_not_mix_with_other_files(tmp_path: Path, name: str, refusal: Refusal) -> None:
    (tmp_path / name).write_text("{}")
    with refusal.raised():
        require_own(tmp_path, RUN)


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "shapes"],
        ["demo", "--quick"],
        ["evaluate", "m", "--prompts", "shapes", "--rewards", "shapes"],
        ["steer", "m", "--prompts", "a dog"],
    ],
)
def test_every_command_that_writes_leaves_others_files_alone(
    tmp_path: Path, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    names = {
        "train": "summary.json",
        "demo": "checkpoints",
        "evaluate": "summary.json",
        "steer": "scores.json",
    }
    (tmp_path / names[arguments[0]]).write_text("{}")
    assert main([*arguments, "--out", str(tmp_path)]) == USAGE
    assert "choose another --out" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == [names[arguments[0]]]


@pytest.mark.parametrize(
    ("name", "kind"),
    [("checkpoints", RUN), ("pretrained", DEMO), ("statistics.json", STEERED), ("scores.json", EVALUATION)],
)
def test_a_command_goes_on_in_its_own_directory(tmp_path: Path, name: str, kind: str) -> None:
    require_own(tmp_path / "new", kind)
    (tmp_path / name).mkdir()
    require_own(tmp_path, kind)


def test_a_demos_report_is_not_overwritten(tmp_path: Path) -> None:
    for name in ("metrics.jsonl", "summary.json", "report.html"):
        (tmp_path / name).write_text("the demo's")
    with Refusal(
        "holds a demo, whose report.html this one would replace",
        cause="`lacfast report` of a demo's directory.",
        remedy="open that, or give the directory of a training run",
    ).raised():
        write_run_report(tmp_path)
    assert (tmp_path / "report.html").read_text() == "the demo's"
