"""Seeds of a run's draws, functions of its seed and a counter: a run that goes on draws the same."""

from __future__ import annotations


def derived_seed(seed: int, counter: int) -> int:
    """The seed of draw number `counter`, as an iteration: seed * 1000003 + counter, modulo 2^63."""
    return (seed * 1_000_003 + counter) % 2**63


def epoch_seed(seed: int, iteration: int, epoch: int) -> int:
    """The seed of an epoch of an iteration's update, modulo 2^63."""
    return (derived_seed(seed, iteration) * 97 + epoch) % 2**63
