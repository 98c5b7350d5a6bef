"""From curves to claims: scores at equal cost, and paired differences with bootstrap intervals."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from bench.learning.runs import Point

RESAMPLES = 10_000
CONFIDENCE = 0.95
JUDGED_PAIRS = 3
"""Below it a bootstrap has next to nothing to draw from."""
Cost = Callable[[Point], float]


def images(point: Point) -> float:
    """The axis of equal images and reward calls."""
    return float(point.images)


def seconds(reward_cost: float) -> Cost:
    """The axis of equal time with a reward that costs `reward_cost` seconds per image."""
    return lambda point: point.seconds + reward_cost * point.images


def along(points: Sequence[Point], cost: Cost, metric: str) -> tuple[np.ndarray, np.ndarray]:
    """Costs and scores of a curve, for interpolation."""
    return (
        np.asarray([cost(point) for point in points]),
        np.asarray([point.scores[metric] for point in points]),
    )


def final(points: Sequence[Point], cost: Cost, metric: str, budget: float) -> float:
    """Score when `budget` is spent, interpolated between judgements."""
    return float(np.interp(budget, *along(points, cost, metric)))


def area(points: Sequence[Point], cost: Cost, metric: str, budget: float) -> float:
    """Mean score over the budget: the area under the curve divided by its width."""
    costs, scores = along(points, cost, metric)
    grid = np.linspace(0, budget, 513)
    return float(np.trapezoid(np.interp(grid, costs, scores), grid) / budget)


def reached(runs: Sequence[Sequence[Point]], cost: Cost, metric: str, level: float, budget: float) -> float:
    """Cost at which the mean score of the runs first is `level`; infinite where it never is in the budget."""
    grid = np.linspace(0, budget, 513)
    scores = np.mean([np.interp(grid, *along(points, cost, metric)) for points in runs], axis=0)
    there = np.flatnonzero(scores >= level)
    return float(grid[there[0]]) if len(there) else math.inf


def common_budget(curves: Sequence[Sequence[Point]], cost: Cost) -> float:
    """The largest cost that every curve reaches."""
    return min(cost(points[-1]) for points in curves)


@dataclass(frozen=True)
class Difference:
    """First minus second arm over paired seeds."""

    mean: float
    low: float
    high: float
    pairs: int

    @property
    def verdict(self) -> str:
        """What the interval allows to say."""
        if self.pairs < JUDGED_PAIRS:
            return "too few seeds"
        if self.low > 0:
            return "ahead"
        return "behind" if self.high < 0 else "undecided"

    def text(self, digits: int = 3) -> str:
        """As a cell of a table."""
        numbers = f"{self.mean:+.{digits}f} [{self.low:+.{digits}f}, {self.high:+.{digits}f}]"
        return f"{numbers} {self.verdict}"


def paired(first: Sequence[float], second: Sequence[float]) -> Difference:
    """Mean difference with the percentile bootstrap's interval over the pairs.

    Raises:
        ValueError: for fewer than two pairs, which have no interval.
    """
    differences = np.asarray(first) - np.asarray(second)
    if len(differences) < 2:
        raise ValueError(f"{len(differences)} pair has no interval; run more seeds")
    random = np.random.default_rng(0)
    rows = random.integers(len(differences), size=(RESAMPLES, len(differences)))
    means = differences[rows].mean(axis=1)
    low, high = np.quantile(means, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Difference(float(differences.mean()), float(low), float(high), len(differences))
