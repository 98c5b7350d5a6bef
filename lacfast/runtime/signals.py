"""Signals that end a run: raised as an exception where its state is whole, held back where it is not."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""A person, a scheduler, a terminal that closed."""


class Stopped(KeyboardInterrupt):
    """A signal asked the process to end."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number

    @property
    def exit_code(self) -> int:
        """What shells report: 130 for Ctrl-C, 143 for `kill`, 129 for a closed terminal."""
        return 128 + self.number


@contextmanager
def raised() -> Iterator[None]:
    """Within the block a signal of ENDING raises Stopped; one that is ignored, as under nohup, stays so."""

    def stop(number: int, _: FrameType | None) -> None:
        raise Stopped(number)

    before = _handlers()
    try:
        for number in before:
            signal.signal(number, stop)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def held_back(work: str) -> Iterator[None]:
    """The first signal of ENDING waits until the block ends; a second one takes effect at once.

    `work` is what would be left half done; the terminal is told that it is finished first.
    """
    before, held = _handlers(), []

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def hold(number: int, _: FrameType | None) -> None:
        held.append(number)
        if len(held) > 1:
            restore()
            signal.raise_signal(number)
        # Python's own files must not be written to from a handler: it may have come within such a write.
        os.write(2, f"lacfast: stopping after {work}; once more stops at once\n".encode())

    try:
        for number in before:
            signal.signal(number, hold)
        yield
    finally:
        restore()
        if len(held) == 1:
            signal.raise_signal(held[0])


class Indivisible:
    """Context of work that is done whole or not at all; a signal that asks to end waits for it."""

    is_whole = True
    """Whether none was cut off, by an error or a second signal, so that what it changes may be kept."""

    @contextmanager
    def __call__(self, work: str) -> Iterator[None]:
        """`work` is what would be left half done, see `held_back`."""
        with held_back(work):
            self.is_whole = False
            yield
            self.is_whole = True


def _handlers() -> dict[signal.Signals, signal._HANDLER]:
    """What ENDING does now, where Python may change it: in the main thread, unless it is ignored."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    found = {number: signal.getsignal(number) for number in ENDING}
    return {number: handler for number, handler in found.items() if handler not in (None, signal.SIG_IGN)}
