"""Whatever goes wrong, the shell gets one line with the remedy and an exit code; a bug its traceback."""

from __future__ import annotations

import errno
import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from refusals import Refusal
from safetensors import SafetensorError

from lacfast import cli
from lacfast.metrics import MetricsLog
from lacfast.report.records import read_metrics
from lacfast.rewards.reward import RewardError
from lacfast.runs.endings import FAILURE, INTERRUPTED, USAGE, ending
from lacfast.runtime.directories import whole_directory


@pytest.fixture
def fails(monkeypatch: pytest.MonkeyPatch) -> Callable[[BaseException], int]:
    """Run a command that raises; returns its exit code."""

    def run(error: BaseException) -> int:
        def raised(self: Any) -> None:
            raise error

        monkeypatch.setattr(cli.Info, "run", raised)
        return cli.main(["info"])

    return run


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ValueError("eta=0 is\nwrong; use 1"), USAGE, "eta=0 is wrong; use 1"),
        (ImportError("it needs pyarrow: pip install pyarrow"), USAGE, "pip install pyarrow"),
        (RewardError("reward 'a' raised; fix it"), FAILURE, "reward 'a' raised; fix it"),
        (FloatingPointError("a gradient is not finite"), FAILURE, "a gradient is not finite"),
        (torch.OutOfMemoryError("CUDA out of memory."), FAILURE, "--train.ppo.microbatch-size"),
        (MemoryError(), FAILURE, "out of memory: MemoryError; sample and train less at a time"),
        (RuntimeError("DefaultCPUAllocator: not enough memory"), FAILURE, "--train.rollout-batch-size"),
        (PermissionError(errno.EACCES, "Permission denied", "w.bin"), FAILURE, "Permission denied: 'w.bin'"),
        (KeyboardInterrupt(), INTERRUPTED, "stopped"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_an_error_is_one_line_and_an_exit_code(
    error: BaseException,
    code: int,
    line: str,
    fails: Callable[[BaseException], int],
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert fails(error) == code
    printed = capsys.readouterr().err
    assert printed.startswith("lacfast: ")
    assert printed.count("\n") == 1
    assert line in printed


def test_a_bug_keeps_its_traceback(fails: Callable[[BaseException], int]) -> None:
    assert ending(KeyError("latents")) is None
    with pytest.raises(KeyError, match="latents"):
        fails(KeyError("latents"))


def test_a_reader_that_leaves_is_no_error() -> None:
    command = [sys.executable, "-m", "lacfast", "train", "shapes", "--help"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode in (0, FAILURE)


class FullDisk(io.RawIOBase):
    """A file without space."""

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")


def write_weights(target: Path) -> None:
    # What safetensors says then.
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


def write_state(target: Path) -> None:
    torch.save({"weight": torch.zeros(1000)}, FullDisk())


@pytest.mark.parametrize("write", [write_weights, write_state])
def test_a_checkpoint_that_does_not_fit_is_named_and_leaves_what_was_there(
    write: Callable[[Path], None], tmp_path: Path
) -> None:
    target = tmp_path / "00000010"
    target.mkdir()
    full = Refusal(
        "00000010 is full",
        cause="A checkpoint on a disk without space.",
        remedy="free some space and start again: a run goes on from its last checkpoint",
        error=OSError,
    )
    with full.raised() as caught, whole_directory(target) as temporary:
        write(temporary)
    assert [path.name for path in tmp_path.iterdir()] == ["00000010"]
    found = ending(caught.value)
    assert found is not None
    assert found.code == FAILURE


def test_other_errors_of_a_save_stay_what_they_are(tmp_path: Path) -> None:
    with pytest.raises(SafetensorError), whole_directory(tmp_path / "new"):
        raise SafetensorError("Error while serializing: invalid dtype")


def test_a_log_that_does_not_fit_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    monkeypatch.setattr(Path, "open", lambda path, *mode, **options: io.TextIOWrapper(FullDisk()))
    with Refusal(
        "metrics.jsonl is full", cause="A log on a disk without space.", remedy="free some", error=OSError
    ).raised():
        log.write("train", 1, loss=0.5)


def test_a_line_that_a_kill_cut_is_dropped_by_the_report_and_by_the_run_that_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    MetricsLog(path).write("train", 1, loss=0.5)
    with path.open("a") as file:
        file.write('{"phase": "train", "iter')
    assert [entry["iteration"] for entry in read_metrics(path)] == [1]
    MetricsLog(path).write("train", 2, loss=0.25)
    assert [entry["iteration"] for entry in read_metrics(path)] == [1, 2]


@pytest.mark.parametrize("line", ["{}", "[]", "not JSON", json.dumps({"phase": "train"})])
def test_any_other_line_that_is_no_entry_is_named(line: str, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    MetricsLog(path).write("train", 1, loss=0.5)
    with path.open("a") as file:
        file.write(line + "\n")
    with Refusal(
        "metrics.jsonl:2 is no entry of a run's log",
        cause="A metrics.jsonl that something else has written to.",
        remedy="remove the line, or give another directory",
    ).raised():
        read_metrics(path)
