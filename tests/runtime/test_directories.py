"""A directory appears whole or not at all, tells damage, and replaces nothing that no save has written."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from refusals import Refusal

from lacfast.runtime import directories
from lacfast.runtime.directories import (
    MANIFEST,
    DamagedError,
    locked,
    recover,
    recover_all,
    remove,
    require_whole,
    stranger_in,
    whole_directory,
)

SYNC = directories._sync
"""As it is outside of tests."""


def save(target: Path, text: str = "weights") -> None:
    with whole_directory(target) as made:
        (made / "model").mkdir()
        (made / "model" / "weights").write_text(text)


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


@pytest.mark.parametrize("place", ["yesterday/score.json", "saved/notes.txt", "saved/model/mine"])
def test_what_no_save_has_written_is_never_deleted(tmp_path: Path, place: str) -> None:
    target = tmp_path / "runs"
    if "saved" in place:
        target = tmp_path / "runs" / "saved"
        save(target)
    mine = tmp_path / "runs" / place
    mine.parent.mkdir(parents=True, exist_ok=True)
    mine.write_text("mine")
    with Refusal(
        "would delete",
        cause="`save` into a directory that holds something besides an earlier save.",
        remedy="choose a new or empty directory",
    ).raised():
        save(target)
    assert mine.read_text() == "mine"
    remove(target)
    assert mine.read_text() == "mine"


def test_a_file_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("mine")
    with pytest.raises(ValueError, match="would delete runs"):
        save(tmp_path / "runs")


def test_an_empty_directory_and_an_earlier_save_are_replaced(tmp_path: Path) -> None:
    (tmp_path / "saved").mkdir()
    for text in ("one", "two"):
        save(tmp_path / "saved", text)
        assert (tmp_path / "saved" / "model" / "weights").read_text() == text
    assert names(tmp_path) == ["saved"]


def test_a_save_before_there_were_manifests_is_replaced(tmp_path: Path) -> None:
    save(tmp_path / "saved")
    (tmp_path / "saved" / "trainer.pt").touch()
    (tmp_path / "saved" / MANIFEST).unlink()
    save(tmp_path / "saved", "two")
    assert (tmp_path / "saved" / "model" / "weights").read_text() == "two"


def test_a_save_is_on_the_disk_before_it_takes_its_place_and_its_name_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[Path | str] = []
    rename = directories._rename
    monkeypatch.setattr(directories, "_sync", SYNC)
    monkeypatch.setattr(os, "fsync", lambda opened: events.append(Path(f"/proc/self/fd/{opened}").readlink()))
    monkeypatch.setattr(directories, "_rename", lambda *paths: (events.append("rename"), rename(*paths)))
    save(tmp_path / "saved")
    made, renamed = events[0], events.index("rename")
    assert isinstance(made, Path)
    while made.parent != tmp_path:
        made = made.parent
    held = [made, made / "model", made / "model" / "weights", made / MANIFEST]
    assert set(events[:renamed]) == set(held)
    assert events[renamed + 1 :] == [tmp_path]


def test_an_error_in_a_save_leaves_the_earlier_one(tmp_path: Path) -> None:
    save(tmp_path / "saved")
    with pytest.raises(RuntimeError), whole_directory(tmp_path / "saved"):
        raise RuntimeError
    assert names(tmp_path) == ["saved"]
    require_whole(tmp_path / "saved")


def die(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_after_one(rename: Callable[..., None]) -> Callable[..., None]:
    left = iter([rename])

    def replace(*paths: Path) -> None:
        next(left, die)(*paths)

    return replace


KILLS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "before it is whole": lambda patch: patch.setattr(directories, "_write_manifest", die),
    "before its place": lambda patch: patch.setattr(directories, "_take_place", die),
    "between two renames": lambda patch: patch.setattr(
        directories, "_rename", die_after_one(directories._rename)
    ),
    "behind them": lambda patch: patch.setattr(directories.shutil, "rmtree", die),
}


def save_and_die(target: Path, kill: str) -> None:
    def body() -> None:
        KILLS[kill](pytest.MonkeyPatch())
        save(target, "two")

    process = multiprocessing.get_context("fork").Process(target=body)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL


@pytest.mark.parametrize("kill", KILLS)
@pytest.mark.parametrize("is_read_first", [True, False])
def test_what_a_killed_save_leaves_is_removed_and_nothing_is_lost(
    tmp_path: Path, kill: str, is_read_first: bool
) -> None:
    target = tmp_path / "saved"
    save(target, "one")
    save_and_die(target, kill)
    assert len(names(tmp_path)) == 2
    if is_read_first:
        recover(target)
        assert names(tmp_path) == ["saved"]
        assert (target / "model" / "weights").read_text() == ("two" if kill == "behind them" else "one")
    save(target, "three")
    assert (target / "model" / "weights").read_text() == "three"
    assert names(tmp_path) == ["saved"]


def operations_until(die_at: int, target: Path) -> int:
    """Save in a process that is killed before its change number `die_at` of files; how many came."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        count = [0]

        def counted(event: str, arguments: Any) -> None:
            # As Python itself reports them.
            is_written = event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR)
            if is_written or event in ("os.rename", "os.mkdir", "os.remove", "os.rmdir"):
                count[0] += 1
                if count[0] == die_at:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(counted)
        save(target, "two")
        made = count[0]
        os.write(writing, str(made).encode())
        os._exit(0)
    os.close(writing)
    _, status = os.waitpid(child, 0)
    with os.fdopen(reading) as pipe:
        made = int(pipe.read() or die_at - 1)
    assert status == (signal.SIGKILL if made < die_at and die_at else 0)
    return made


def test_a_save_that_is_killed_between_any_two_operations_leaves_the_old_or_the_new_one(
    tmp_path: Path,
) -> None:
    target, found = tmp_path / "best", []
    save(target, "one")
    planned = operations_until(0, target)
    assert planned >= 9
    for die_at in range(1, planned + 1):
        remove(target)
        save(target, "one")
        operations_until(die_at, target)
        recover_all(tmp_path)
        assert names(tmp_path) == ["best"], die_at
        require_whole(target)
        found.append((target / "model" / "weights").read_text())
    assert sorted(found) == found, "once it has the new one, it keeps it"
    assert set(found) == {"one", "two"}


def test_a_save_that_another_process_is_making_is_left_alone(tmp_path: Path) -> None:
    with whole_directory(tmp_path / "saved") as made:
        (made / "weights").write_text("mine")
        process = multiprocessing.get_context("fork").Process(target=save, args=(tmp_path / "other",))
        process.start()
        process.join()
        recover(tmp_path / "saved")
        assert made.exists()
    assert names(tmp_path) == ["other", "saved"]


@pytest.mark.parametrize(
    ("damage", "refusal"),
    [
        (
            lambda file: file.unlink(),
            Refusal(
                "model/weights is missing",
                cause="A file of a checkpoint was deleted.",
                remedy="restore it from a copy, or go on from the checkpoint before it",
                error=DamagedError,
            ),
        ),
        (
            lambda file: file.write_text("wei"),
            Refusal(
                "model/weights has 3 bytes of 7",
                cause="A file of a checkpoint was cut off, as by a full disk or a copy that was stopped.",
                remedy="restore it from a copy, or go on from the checkpoint before it",
                error=DamagedError,
            ),
        ),
        (
            lambda file: file.write_text("weighed"),
            Refusal(
                "model/weights is not what was written",
                cause="A file of a checkpoint was changed, by a disk or by hand.",
                remedy="or delete lacfast-manifest.json if you changed it",
                error=DamagedError,
            ),
        ),
        (
            lambda file: (file.parents[1] / MANIFEST).write_text("{"),
            Refusal(
                "lacfast-manifest.json cannot be read",
                cause="The list of a checkpoint's files was damaged itself.",
                remedy="go on from the checkpoint before it",
                error=DamagedError,
            ),
        ),
        (
            lambda file: (file.parents[1] / MANIFEST).write_text(
                '{"lacfast": "9", "format": 2, "files": {}}'
            ),
            Refusal(
                "has format 2 of lacfast 9",
                cause="A later version of lacfast wrote the checkpoint.",
                remedy="install that version",
            ),
        ),
    ],
)
def test_damage_is_named_with_the_directory(tmp_path: Path, damage: object, refusal: Refusal) -> None:
    save(tmp_path / "00000004")
    require_whole(tmp_path / "00000004")
    damage(tmp_path / "00000004" / "model" / "weights")  # type: ignore[operator]
    with refusal.raised() as caught:
        require_whole(tmp_path / "00000004")
    assert str(tmp_path / "00000004") in str(caught.value)


def test_the_manifest_lists_every_file(tmp_path: Path) -> None:
    save(tmp_path / "saved")
    manifest = json.loads((tmp_path / "saved" / MANIFEST).read_text())
    assert manifest["format"] == directories.FORMAT
    assert list(manifest["files"]) == ["model/weights"]
    assert stranger_in(tmp_path / "saved") is None


HOLDER = """
import sys, time
from pathlib import Path
from lacfast.runtime.directories import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_directory_in_use_names_its_owner_and_is_free_when_that_is_dead(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        process.stdout.readline()
        with (
            Refusal(
                "is in use by process",
                cause="Two processes train into one directory.",
                remedy="wait until it ends, stop it, or choose another directory",
            ).raised() as caught,
            locked(tmp_path),
        ):
            pass
        assert f"process {process.pid} on {os.uname().nodename}" in str(caught.value)
    finally:
        process.kill()
        process.wait()
    with locked(tmp_path):
        assert str(os.getpid()) in (tmp_path / directories.LOCK).read_text()


def test_two_runs_of_one_process_do_not_share_a_directory(tmp_path: Path) -> None:
    with (
        locked(tmp_path),
        pytest.raises(ValueError, match=f"in use by process {os.getpid()}"),
        locked(tmp_path),
    ):
        pass
