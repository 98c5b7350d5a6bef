"""Timing providers in turn, so that a busy machine slows them all alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

Provider = Callable[[], object]
Clock = Callable[[], float]


def race(
    providers: dict[str, Provider],
    *,
    rounds: int = 40,
    warmup: int = 5,
    clock: Clock = time.thread_time,
    is_primed: bool = True,
) -> dict[str, list[float]]:
    """Seconds of this thread's CPU time in every round of every provider, in turn.

    CPU time, since another process on the core must not count. Each timed call follows an untimed one, so
    caches and the allocator are in the state in which the provider itself leaves them, not its neighbour.
    Calls of seconds need none: is_primed=False.
    """
    for provider in providers.values():
        for _ in range(warmup):
            provider()
    seconds: dict[str, list[float]] = {name: [] for name in providers}
    for _ in range(rounds):
        for name, provider in providers.items():
            if is_primed:
                provider()
            start = clock()
            provider()
            seconds[name].append(clock() - start)
    return seconds


def speed_ups(seconds: dict[str, list[float]], baseline: str) -> dict[str, float]:
    """Provider -> median over the rounds of baseline / provider within the round."""
    return {
        name: statistics.median(base / own for base, own in zip(seconds[baseline], times, strict=True))
        for name, times in seconds.items()
    }


def affordable_rounds(
    providers: dict[str, Provider], budget: float, *, most: int = 40, clock: Clock = time.thread_time
) -> int:
    """How many rounds of a race fit `budget` seconds: at least 5, at most `most`.

    Measured by one call of each after one that compiles and allocates.
    """
    for provider in providers.values():
        provider()
    start = clock()
    for provider in providers.values():
        provider()
    # A round is two calls.
    return max(5, min(most, int(budget / max(2 * (clock() - start), 1e-9))))
