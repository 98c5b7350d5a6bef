"""Ranks that a command starts by itself: they work beside it, end with it, and tell why they could not."""

from __future__ import annotations

import multiprocessing
import os
import time

import pytest

from lacfast.distributed import World
from lacfast.runs.launch import joined_by


def _numbers(offset: int) -> list[int]:
    """What every rank says."""
    world = World.current()
    return world.entries([offset + world.rank], "numbers")


def _refuses() -> None:
    raise ValueError("nothing can be done with that; ask for something else")


def _waits() -> None:
    World.current().wait("what never comes")


def test_the_others_work_beside_the_block_and_leave_no_trace() -> None:
    before = dict(os.environ)
    with joined_by(2, _numbers, 10) as world:
        assert (world.rank, world.size) == (0, 2)
        assert _numbers(10) == [10, 11]
    assert World.current().size == 1
    assert dict(os.environ) == before
    assert multiprocessing.active_children() == []


def test_one_process_starts_no_other() -> None:
    with joined_by(1, _refuses) as world:
        assert world.size == 1
        assert multiprocessing.active_children() == []


def test_a_block_that_fails_ends_the_others_at_once(capfd: pytest.CaptureFixture[str]) -> None:
    failed_at = []

    def fail() -> None:
        failed_at.append(time.monotonic())
        raise KeyError("its own")

    with pytest.raises(KeyError, match="its own"), joined_by(2, _waits):
        fail()
    assert time.monotonic() - failed_at[0] < 5
    assert multiprocessing.active_children() == []
    assert capfd.readouterr().err == "", "the block's own error is what is told"


def test_another_rank_that_fails_tells_why(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RuntimeError), joined_by(2, _refuses):
        _waits()
    assert multiprocessing.active_children() == []
    assert "lacfast: nothing can be done with that; ask for something else" in capfd.readouterr().err


def test_a_rank_of_a_launcher_starts_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(World, "current", lambda: World(rank=1, size=2))
    with pytest.raises(ValueError, match="start it alone"), joined_by(2, _waits):
        pass
