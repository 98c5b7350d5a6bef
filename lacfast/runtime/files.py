"""Writing: one error for a place that cannot be written, one for a full disk, and readable JSON."""

from __future__ import annotations

import errno
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_FULL = (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def writing_to(place: str | Path) -> Iterator[None]:
    """Let the block fail with one line that names the place and the remedy.

    Raises:
        ValueError: when the block may not write there.
        OSError: when the disk is full.
    """
    with needing_space(place):
        try:
            yield
        except OSError as error:
            if is_full(error):
                raise
            raise ValueError(
                f"cannot write to {place}: {error.strerror}; choose a directory that you may write to"
            ) from error


@contextmanager
def needing_space(place: str | Path) -> Iterator[None]:
    """Let the block fail by the name of the place when the disk is full, whoever writes.

    Raises:
        OSError: then, with the remedy.
    """
    try:
        yield
    except Exception as error:
        if not is_full(error):
            raise
        raise OSError(
            f"the disk of {place} is full; free some space and start again: a run goes on from its last "
            "checkpoint"
        ) from error


def is_full(error: BaseException) -> bool:
    """Whether a write failed for want of space: torch and safetensors raise errors of their own for that."""
    seen: BaseException | None = error
    while seen is not None:
        if getattr(seen, "errno", None) in _FULL or f"os error {errno.ENOSPC}" in str(seen):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


def require_writable(directory: Path) -> None:
    """Make the directory of a result, --out, before there is one to lose.

    Raises:
        ValueError: when nothing can be written there.
    """
    with writing_to(f"--out {directory}"):
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON; the file has the old or the new value, whenever the process ends."""
    temporary = path.with_name(f".{path.name}.partial")
    temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, path)
