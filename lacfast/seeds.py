"""Seeds of a run's draws, functions of its seed and a counter: a run that goes on draws the same."""

from __future__ import annotations


def derived_seed(seed: int, counter: int) -> int:
    """The seed of draw number `counter`, as an iteration or an epoch: seed * 1000003 + counter."""
    return seed * 1_000_003 + counter
