"""A run that is killed at any moment goes on to the same bits, and leaves nothing else behind."""

from __future__ import annotations

import json
import multiprocessing
import os
from contextlib import redirect_stdout
from pathlib import Path

import killed_runs
import pytest


def told(directory: Path, kills: int) -> None:
    # The runs that it forks have no standard output, so it is the file descriptor that leads to the file.
    os.dup2(os.open(directory / "told", os.O_WRONLY | os.O_CREAT), 1)
    with open(1, "w", encoding="utf-8", closefd=False) as file, redirect_stdout(file):
        killed_runs.main(directory, kills, 0)


@pytest.mark.parametrize("kills", [2, pytest.param(40, marks=pytest.mark.slow)])
def test_a_killed_run_ends_like_one_that_was_not(tmp_path: Path, kills: int) -> None:
    """Half of the kills fall into saves, the others at any moment."""
    process = multiprocessing.get_context("fork").Process(target=told, args=(tmp_path, kills))
    process.start()
    process.join()
    assert process.exitcode == 0
    found = [json.loads(line) for line in (tmp_path / "told").read_text(encoding="utf-8").splitlines()]
    assert [kill for kill in found if kill["differs"]] == []
    assert len(found) == kills
    assert sum(kill["in_save"] for kill in found) == kills // 2
