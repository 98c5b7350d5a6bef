"""Directories that appear whole or not at all, tell damage, and replace nothing that no save has written."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import secrets
import shutil
import socket
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lacfast.runtime.failures import FailedError
from lacfast.runtime.files import needing_space, write_json, writing_to
from lacfast.runtime.signals import held_back

MANIFEST = "lacfast-manifest.json"
"""Format, and size and checksum of every file of a directory: what tells ours from others'."""
FORMAT = 1
"""Version of what lies in a directory with a manifest; a change that the last one cannot read raises it."""
LOCK = "run.lock"
_LEFTOVER = re.compile(r"\.(?P<name>.+)\.[0-9a-f]{8}\.(?P<kind>partial|replaced)")
_BEFORE_MANIFESTS = {
    *("trainer.pt", "critic.safetensors", "critic.json", "lacfast.json", "model_index.json"),
    *("pytorch_lora_weights.safetensors", "model", "text", "codec", "index.json", "score.json", "trl.json"),
}
"""Names that a save without a manifest may hold, beside the parts that its model_index.json names."""


class DamagedError(FailedError):
    """A directory is not what was written."""


@contextmanager
def whole_directory(target: Path) -> Iterator[Path]:
    """A temporary directory beside `target` that takes its place when the block ends without an error.

    What a process that was killed left of an earlier call is removed first.

    Raises:
        ValueError: when `target` holds what no call has written, before the block; when there is no writing.
        OSError: when the disk is full; `target` is as before.
    """
    target = Path(os.path.realpath(target))
    recover(target)
    require_replaceable(target)
    with writing_to(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary, lock = _temporary(target)
    try:
        with needing_space(target):
            yield temporary
            _write_manifest(temporary)
            _reach_disk(temporary)
        require_replaceable(target)
        with held_back("this save"):
            _take_place(temporary, target)
            _sync(target.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        os.close(lock)


def _temporary(target: Path) -> tuple[Path, int]:
    """A new directory beside `target`, and the lock by which others see its writer alive."""
    while True:
        made = target.with_name(f".{target.name}.{secrets.token_hex(4)}.partial")
        made.mkdir()
        lock = _lock(made)
        if lock is not None:
            return made, lock


def _reach_disk(directory: Path) -> None:
    """Wait until all of it is on the disk: a rename may get there first, and the power fail between."""
    for path in directory.rglob("*"):
        _sync(path)
    _sync(directory)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Of a file system that cannot be asked; where it cannot write, it says so.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


_rename = os.replace


def _take_place(temporary: Path, target: Path) -> None:
    """Two renames: after a kill between them `recover` undoes the first."""
    if not target.exists():
        _rename(temporary, target)
        return
    replaced, lock = temporary.with_suffix(".replaced"), _lock(target)
    try:
        _rename(target, replaced)
        _rename(temporary, target)
        shutil.rmtree(replaced)
    finally:
        if lock is not None:
            os.close(lock)


def remove(directory: Path) -> None:
    """Delete what saves wrote, as a whole; a directory with something else in it stays."""
    if stranger_in(directory) is None:
        doomed = directory.with_name(f".{directory.name}.{secrets.token_hex(4)}.partial")
        os.replace(directory, doomed)
        shutil.rmtree(doomed)


def recover(target: Path) -> None:
    """Put `target` back if a kill left it moved aside, and remove what dead writers left beside it."""
    if not target.parent.is_dir():
        return
    for path in target.parent.iterdir():
        found = _LEFTOVER.fullmatch(path.name)
        if found is None or found["name"] != target.name or not _is_abandoned(path):
            continue
        if found["kind"] == "replaced" and not target.exists():
            os.replace(path, target)
        else:
            shutil.rmtree(path)


def recover_all(parent: Path) -> None:
    """`recover` for everything that was ever written into `parent`."""
    names = {found["name"] for path in parent.iterdir() if (found := _LEFTOVER.fullmatch(path.name))}
    for name in sorted(names):
        recover(parent / name)


def _lock(directory: Path) -> int | None:
    """A descriptor that keeps the directory locked while this process lives; None where it is gone."""
    try:
        descriptor = os.open(directory, os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    except OSError:
        # Without locks nobody can call it abandoned, so it stays.
        return descriptor
    if not directory.exists():
        os.close(descriptor)
        return None
    return descriptor


def _is_abandoned(directory: Path) -> bool:
    """Whether its writer is dead: the lock of a process ends with it, whatever its number or host."""
    try:
        descriptor = os.open(directory, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return True


def require_replaceable(target: Path) -> None:
    """
    Raises:
        ValueError: when replacing `target` would delete something that no save has written.
    """
    stranger = stranger_in(target)
    if stranger is not None:
        raise ValueError(
            f"saving to {target} would delete {stranger}, which no save has written; choose a new or empty "
            "directory, or one that holds an earlier save and nothing else"
        )


def stranger_in(target: Path) -> str | None:
    """The first entry of `target` that no save has written; None when there is none."""
    if not target.is_dir():
        return target.name if target.exists() else None
    manifest = target / MANIFEST
    files = set(_read_manifest(target)["files"]) if manifest.exists() else _before_manifests(target)
    known = {MANIFEST, *(Path(name).parts[0] for name in files)}
    for path in sorted(target.iterdir()):
        if path.name not in known:
            return path.name
    if not manifest.exists():
        return None
    found = {path.relative_to(target).as_posix() for path in target.rglob("*") if not path.is_dir()}
    return min(found - files - {MANIFEST}, default=None)


def _before_manifests(target: Path) -> set[str]:
    index = target / "model_index.json"
    parts = json.loads(index.read_text(encoding="utf-8")).keys() if index.exists() else ()
    saved = _BEFORE_MANIFESTS | set(parts)
    is_ours = any((target / name).exists() for name in ("trainer.pt", "lacfast.json", "critic.safetensors"))
    return saved if is_ours else set()


def _write_manifest(directory: Path) -> None:
    files = {
        path.relative_to(directory).as_posix(): {"bytes": path.stat().st_size, "sha256": _checksum(path)}
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path != directory / MANIFEST
    }
    write_json(directory / MANIFEST, {"lacfast": version("lacfast"), "format": FORMAT, "files": files})


def _read_manifest(directory: Path) -> dict[str, Any]:
    try:
        manifest: dict[str, Any] = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
        written, needed = manifest["lacfast"], manifest["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedError(f"{directory} is damaged: {MANIFEST} cannot be read; {_REMEDY}") from error
    if needed > FORMAT:
        raise ValueError(
            f"{directory} has format {needed} of lacfast {written}, and this version reads format {FORMAT}; "
            "install that version"
        )
    return manifest


_REMEDY = "restore it from a copy, or go on from the checkpoint before it"


def require_whole(directory: Path) -> None:
    """Compare every file with the manifest, where there is one: earlier versions wrote none.

    Raises:
        DamagedError: naming the file that is missing or not what was written.
        ValueError: for the format of a later version.
    """
    if not (directory / MANIFEST).exists():
        return
    for name, written in _read_manifest(directory)["files"].items():
        path, fault = directory / name, ""
        if not path.is_file():
            fault = "is missing"
        elif path.stat().st_size != written["bytes"]:
            fault = f"has {path.stat().st_size} bytes of {written['bytes']}"
        elif _checksum(path) != written["sha256"]:
            fault = "is not what was written"
        if fault:
            raise DamagedError(
                f"{directory} is damaged: {name} {fault}; {_REMEDY}, or delete {MANIFEST} if you changed it"
            )


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """The right to write into a directory of a run, which one process has at a time.

    The operating system frees the lock of a process that has ended, however it did.

    Raises:
        ValueError: when another process has it; its host and number are named.
    """
    with writing_to(directory):
        directory.mkdir(parents=True, exist_ok=True)
        file = (directory / LOCK).open("a+", encoding="utf-8")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            raise ValueError(
                f"{directory} is in use by {file.read().strip() or 'another process'}; wait until it ends, "
                "stop it, or choose another directory"
            ) from error
        except OSError as error:
            warnings.warn(f"{directory} cannot be locked: {error}; start no second run there", stacklevel=3)
        file.seek(0)
        file.truncate()
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield
