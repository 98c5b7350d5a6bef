"""Calls run in order in threads that can be left behind."""

from __future__ import annotations

import threading
import time
import weakref
from concurrent.futures import CancelledError
from functools import partial

import pytest

from lacfast.rewards.workers import Workers


def test_calls_run_in_order_each_with_its_own_result_or_error() -> None:
    workers = Workers(1, "test")
    seen: list[int] = []

    def divide(number: int) -> int:
        seen.append(number)
        return 6 // number

    futures = [workers.submit(partial(divide, number)) for number in (1, 0, 3)]
    assert workers.close()
    assert seen == [1, 0, 3]
    assert (futures[0].result(), futures[2].result()) == (6, 2)
    with pytest.raises(ZeroDivisionError):
        futures[1].result()


def test_a_call_that_waits_for_ever_is_left_behind() -> None:
    workers, release = Workers(1, "test"), threading.Event()
    running, queued = workers.submit(release.wait), workers.submit(release.wait)
    while not running.running():
        time.sleep(0.001)
    start = time.monotonic()
    assert not workers.close(cancel=True, wait_s=0.05)
    assert time.monotonic() - start < 2
    assert workers.stopped.is_set()
    for future in (running, queued):
        with pytest.raises(CancelledError):
            future.result()
    assert all(thread.daemon for thread in threading.enumerate() if thread.name.startswith("test-"))
    # What comes too late changes nothing.
    release.set()
    assert workers.close()
    assert isinstance(running.exception(), CancelledError)


def test_a_thread_that_waits_keeps_nothing_of_its_last_call() -> None:
    class Batch:
        pass

    workers, batch = Workers(1, "test"), Batch()
    kept = weakref.ref(batch)
    workers.submit(partial(id, batch)).result()
    del batch
    deadline = time.monotonic() + 2
    while kept() is not None and time.monotonic() < deadline:
        time.sleep(0.001)
    assert kept() is None
    workers.close()
