"""The command line: help without heavy imports, clean errors, `info` that tells the truth."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lacfast.cli import USAGE_ERROR, main

HEAVY = ("torch", "diffusers", "matplotlib", "scipy", "numpy")


def lacfast(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    return subprocess.run(
        [sys.executable, "-m", "lacfast", *arguments],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )


def test_help_lists_the_commands_and_imports_nothing_heavy() -> None:
    script = (
        "import sys, lacfast.cli\n"
        "try:\n    lacfast.cli.main(['--help'])\nexcept SystemExit:\n    pass\n"
        f"print([name for name in {HEAVY} if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "[]"
    assert "demo" in result.stdout
    assert "info" in result.stdout


def test_demo_help_explains_every_flag() -> None:
    result = lacfast("demo", "--help")
    assert result.returncode == 0
    for flag in ("--out", "--budget", "--seed", "--backbone", "--threads", "--quick"):
        assert flag in result.stdout


def test_unwritable_out_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    result = lacfast("demo", "--out", str(tmp_path / "file" / "demo"))
    assert result.returncode == USAGE_ERROR
    assert result.stderr.startswith("lacfast: cannot write to --out")
    assert len(result.stderr.splitlines()) == 1
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    "arguments",
    [["demo"], ["demo", "--out", "x", "--backbone", "vit"], ["fly"], ["demo", "--out", "x", "--seed", "one"]],
)
def test_wrong_usage_exits_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main(arguments)
    assert exit_info.value.code == USAGE_ERROR
    capsys.readouterr()


def test_info_json_says_which_kernels_are_usable(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--json"]) == 0
    described = json.loads(capsys.readouterr().out)
    assert described["versions"]["torch"].startswith("2.")
    assert described["kernels"]["reference"] == "usable"
    assert all(isinstance(reason, str) and reason for reason in described["kernels"].values())
    assert {"rewards", "test", "dev"} <= described["extras"].keys()


def test_info_lists_the_extras_of_the_project() -> None:
    """The names and packages that `info` reports are those of pyproject.toml."""
    tomllib = pytest.importorskip("tomllib")
    from lacfast.runs.environment import EXTRAS

    project = Path(__file__).resolve().parents[1] / "pyproject.toml"
    declared = tomllib.loads(project.read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    assert declared.keys() == EXTRAS.keys()
    for extra, packages in EXTRAS.items():
        named = {requirement.partition(">")[0] for requirement in declared[extra]}
        assert set(packages) == {name for name in named if not name.startswith("lacfast")}, extra


def test_info_table_tells_why_a_backend_is_not_usable() -> None:
    result = lacfast("info")
    assert result.returncode == 0
    for section in ("versions", "processor", "cuda", "kernels", "extras"):
        assert section in result.stdout
    assert "usable" in result.stdout


def test_a_dry_run_shows_settings_and_costs_and_trains_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["train", "shapes", "--dry-run", "--train.batch-size", "24"]) == 0
    printed = capsys.readouterr().out
    assert '"batch_size": 24' in printed
    assert "192 forwards" in printed
    assert list(tmp_path.iterdir()) == []


def test_flags_reach_the_parts_of_a_preset(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    flags = ["--model", str(tmp_path), "--lora.rank", "7", "--train.eval-sampler.num-steps", "3"]
    assert main(["train", "sd15-ddpo", *flags, "--rewards", "pickscore", "0.5", "--dry-run"]) == USAGE_ERROR
    # Nothing was at --model, which only settings that were understood can say.
    assert str(tmp_path) in capsys.readouterr().err
