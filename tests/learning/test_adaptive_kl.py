"""The KL weight moves towards its target as RLHF's rule says."""

from __future__ import annotations

import math

import pytest
from refusals import Refusal

from lacfast.config import KLPenalty
from lacfast.learning.adaptive_kl import adapted_weight


@pytest.mark.parametrize(
    ("kl", "weight"),
    [(5.0, 0.102), (1.1, 0.101), (1.0, 0.1), (0.9, 0.099), (0.0, 0.098), (math.nan, 0.1), (math.inf, 0.1)],
)
def test_the_weight_moves_in_proportion_to_the_error_and_by_at_most_two_percent(
    kl: float, weight: float
) -> None:
    assert adapted_weight(0.1, kl, target=1.0) == pytest.approx(weight)


def test_thirty_iterations_at_the_anchor_leave_more_than_half_of_the_weight() -> None:
    weight = 0.04
    for _ in range(30):
        weight = adapted_weight(weight, 0.0, target=1e-4)
    assert 0.02 < weight < 0.04


@pytest.mark.parametrize("first", [0.01, 10.0])
def test_a_policy_that_answers_the_weight_is_held_at_the_target(first: float) -> None:
    """KL = 1 / (4 beta), as of a quadratic gain against a quadratic penalty, from a weight far off."""
    weight = first
    for _ in range(400):
        weight = adapted_weight(weight, 1 / (4 * weight), target=2.0)
    assert 1 / (4 * weight) == pytest.approx(2.0, rel=0.01)


def test_a_penalty_of_no_weight_is_refused() -> None:
    with Refusal("weight=0.0", cause="A penalty that counts nothing.", remedy="must be > 0").raised():
        KLPenalty(0.0)
