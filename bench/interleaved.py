"""Timing providers in turn, so that a busy machine slows them all alike."""

from __future__ import annotations

import time
from collections.abc import Callable

Provider = Callable[[], object]


def race(providers: dict[str, Provider], *, rounds: int = 40, warmup: int = 5) -> dict[str, list[float]]:
    """Seconds of this thread's CPU time in every round of every provider, in turn.

    CPU time, since another process on the core must not count. Each timed call follows an untimed one, so
    caches and the allocator are in the state in which the provider itself leaves them, not its neighbour.
    """
    for provider in providers.values():
        for _ in range(warmup):
            provider()
    seconds: dict[str, list[float]] = {name: [] for name in providers}
    for _ in range(rounds):
        for name, provider in providers.items():
            provider()
            start = time.thread_time()
            provider()
            seconds[name].append(time.thread_time() - start)
    return seconds
