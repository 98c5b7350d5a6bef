"""Threads that share a CPU kernel's work: torch's own, in a process that was forked too."""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from lacfast import ops
from lacfast.records import NoiseKey

SHAPE = (3, 400_000)
TASKS = Path("/proc/self/task")


@pytest.fixture
def three_threads() -> Iterator[None]:
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(1)


def _drawn() -> torch.Tensor:
    return ops.normal_noise(SHAPE, torch.zeros(3, dtype=torch.long), NoiseKey.create(1, range(3)))


@pytest.mark.skipif(sys.platform != "linux", reason="counts a process's threads as Linux lists them")
@pytest.mark.usefixtures("three_threads")
def test_no_threads_are_started_beside_torchs() -> None:
    torch.ones(SHAPE).add_(1)
    before = len(list(TASKS.iterdir()))
    _drawn()
    assert len(list(TASKS.iterdir())) == before


def _has_bits(expected: torch.Tensor) -> None:
    assert torch.get_num_threads() == 3
    assert torch.equal(_drawn(), expected)
    assert torch.equal(torch.ones(SHAPE).add_(1), torch.full(SHAPE, 2.0))


@pytest.mark.usefixtures("three_threads")
def test_a_forked_process_does_not_wait_for_threads_that_it_lacks() -> None:
    expected = _drawn()
    process = multiprocessing.get_context("fork").Process(target=_has_bits, args=(expected,))
    process.start()
    process.join(timeout=30)
    is_waiting = process.is_alive()
    process.kill()
    assert not is_waiting
    assert process.exitcode == 0
    assert torch.equal(_drawn(), expected)
