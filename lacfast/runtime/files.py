"""Writing: one error for a place that cannot be written, and JSON as a person reads it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def writing_to(place: str | Path) -> Iterator[None]:
    """Let the block fail with one line that names the place and the remedy.

    Raises:
        ValueError: when the block may not write there.
    """
    try:
        yield
    except OSError as error:
        raise ValueError(
            f"cannot write to {place}: {error.strerror}; choose a directory that you may write to"
        ) from error


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
