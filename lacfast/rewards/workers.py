"""Threads that can be left behind: what a reward waits for must not hold a run that ends."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from concurrent.futures import CancelledError, Future, InvalidStateError
from contextlib import suppress
from queue import SimpleQueue
from threading import Event, Thread
from typing import Any, TypeVar

import torch
from torch import Tensor

Result = TypeVar("Result")


class Workers:
    """Calls in threads of their own, begun in the order in which they were submitted.

    Threads of `concurrent.futures` are waited for when the process ends; these are not.
    """

    def __init__(self, count: int, name: str) -> None:
        self.stopped = Event()
        """Set when results are no longer wanted: a call that waits should end."""
        self._calls: SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = SimpleQueue()
        self._unfinished: set[Future[Any]] = set()
        self._threads = [
            Thread(target=_work, args=(self._calls,), name=f"{name}-{number}", daemon=True)
            for number in range(count)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, function: Callable[[], Result]) -> Future[Result]:
        """The result of `function()` that will come."""
        future: Future[Result] = Future()
        self._unfinished.add(future)
        future.add_done_callback(self._unfinished.discard)
        self._calls.put((future, function))
        return future

    def close(self, *, cancel: bool = False, wait_s: float = math.inf) -> bool:
        """End the threads once their calls have ended; whether they did.

        Args:
            cancel: drop calls that have not begun, and set `stopped` for the others.
            wait_s: seconds to wait. Calls that are still at work then are left behind: their futures
                raise CancelledError.
        """
        if cancel:
            self.stopped.set()
            for future in tuple(self._unfinished):
                future.cancel()
        for _ in self._threads:
            self._calls.put(None)
        deadline = time.monotonic() + wait_s
        for thread in self._threads:
            # A thread waits for no longer than a C integer of nanoseconds.
            thread.join(None if math.isinf(wait_s) else max(deadline - time.monotonic(), 0.0))
        left_behind = tuple(self._unfinished)
        for future in left_behind:
            with suppress(InvalidStateError):
                future.set_exception(CancelledError())
        return not left_behind


class TooLongError(Exception):
    """A call took longer than it may."""


_CALLER = "lacfast-reward"


class Caller:
    """Calls with time limits, all in one thread, which is left behind when one exceeds its limit."""

    def __init__(self) -> None:
        self._workers = Workers(1, _CALLER)

    def __call__(self, function: Callable[[], Result], limit_s: float, images: Tensor) -> Result:
        """What `function()` returns or raises, without gradients and on this thread's stream of the images.

        Raises:
            TooLongError: after `limit_s` seconds. What it returns later is dropped.
        """
        stream = torch.cuda.current_stream(images.device) if images.is_cuda else None

        def call() -> Result:
            with torch.no_grad(), torch.cuda.stream(stream):
                return function()

        future = self._workers.submit(call)
        try:
            return future.result(None if math.isinf(limit_s) else limit_s)
        except TimeoutError:
            # It may be the function's own.
            if future.done():
                raise
        self.close()
        self._workers = Workers(1, _CALLER)
        raise TooLongError

    def close(self) -> None:
        """End the thread, or leave it behind at its work."""
        self._workers.close(cancel=True, wait_s=0)


def _work(calls: SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None]) -> None:
    while (call := calls.get()) is not None:
        _fulfil(*call)
        # A waiting thread must not keep a batch in memory.
        del call


def _fulfil(future: Future[Any], function: Callable[[], Any]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    # A future that was left behind has its exception already.
    with suppress(InvalidStateError):
        try:
            result = function()
        except BaseException as error:
            future.set_exception(error)
        else:
            future.set_result(result)
