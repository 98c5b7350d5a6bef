"""Processes with a time limit, and what came of them: the parts of the GPU check."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TAIL = 4000
"""Characters kept of a process's output."""


@dataclass
class Part:
    """What came of one part."""

    status: str
    """"passed", "failed", "timed out" or "skipped"."""
    summary: str
    """One line for the table."""
    seconds: float = 0.0
    result: dict[str, Any] = field(default_factory=dict)
    output: str = ""
    """The end of what it printed, unless it passed."""

    @property
    def is_failure(self) -> bool:
        return self.status in ("failed", "timed out")


def run(arguments: list[str], seconds: float, **variables: str) -> tuple[int | None, str]:
    """Exit code (None: stopped after `seconds`) and output of a Python or other process in the checkout.

    `variables` are added to its environment.
    """
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in paths if path)} | variables
    try:
        done = subprocess.run(
            arguments,
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=seconds,
            check=False,
        )
    except subprocess.TimeoutExpired as expired:
        output = expired.output or b""
        return None, output.decode(errors="replace") if isinstance(output, bytes) else output
    return done.returncode, done.stdout


def judged(code: int | None, output: str, seconds: float, summary: str, result: dict[str, Any]) -> Part:
    """A part from how its process ended; what it left is kept however it ended."""
    if code is None:
        return Part("timed out", f"stopped after {seconds:g} s; {summary}", 0.0, result, output[-TAIL:])
    status = "passed" if code == 0 else "failed"
    return Part(status, summary, 0.0, result, "" if code == 0 else output[-TAIL:])


def left_in(path: Path) -> dict[str, Any]:
    """The JSON that a process wrote, also a part of it; empty without one."""
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return {}
    return content
