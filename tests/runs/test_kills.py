"""A run that is killed at any moment goes on to the same bits, and leaves nothing else behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "killed_runs.py"


@pytest.mark.parametrize("kills", [6, pytest.param(40, marks=pytest.mark.slow)])
def test_a_killed_run_ends_like_one_that_was_not(tmp_path: Path, kills: int) -> None:
    """Half of the kills fall into saves, the others at any moment."""
    command = [sys.executable, str(SCRIPT), str(tmp_path), str(kills), "0"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 0, result.stderr
    told = [json.loads(line) for line in result.stdout.splitlines()]
    assert [kill for kill in told if kill["differs"]] == []
    assert len(told) == kills
    assert sum(kill["in_save"] for kill in told) == kills // 2
