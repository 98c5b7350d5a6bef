"""What the host does beside replays is timed, and a microbatch's part stays below its bound.

python -m pytest bench/test_bench_host_work.py -m claim -s      the bound, on a machine that is idle
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from bench import host_work
from bench.matched_loops import tiny

BOUND = 1e-4
"""Seconds of the host per microbatch besides the replay."""


@pytest.fixture(scope="module")
def walks() -> dict[str, Callable[[], object]]:
    return host_work.walks(tiny("dit"))


@pytest.mark.parametrize("name", host_work.WALKS)
def test_walk(name: str, walks: dict[str, Callable[[], object]], benchmark: Any, is_smoke: bool) -> None:
    benchmark.group = "host work of a tiny transformer"
    benchmark.pedantic(walks[name], rounds=1 if is_smoke else 50, warmup_rounds=0 if is_smoke else 5)


def test_a_microbatch_is_timed_by_what_one_more_takes() -> None:
    assert host_work.microbatch_seconds(rounds=1) > 0


def test_eager_ops_are_timed_beside_a_function_of_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_work, "CALLS", 1)
    microseconds = host_work.eager_microseconds(rounds=1)
    assert len(microseconds) == len(host_work.eager_calls()) == 8
    assert min(microseconds.values()) > 0
    after_other_work = host_work.eager_microseconds_after_other_work(rounds=1)
    assert after_other_work.keys() == microseconds.keys()
    assert min(after_other_work.values()) > 0


@pytest.mark.claim
def test_a_microbatch_takes_a_tenth_of_a_millisecond_of_the_host() -> None:
    seconds = host_work.microbatch_seconds(rounds=20)
    print(f"\n{1e6 * seconds:.0f} us of the host per captured microbatch")
    assert seconds < BOUND
