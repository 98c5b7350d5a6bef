"""The KL weight moves towards its target as PPO's rule says."""

from __future__ import annotations

import math

import pytest

from lacfast.config import PPOConfig
from lacfast.learning.adaptive_kl import adapted_weight


@pytest.mark.parametrize(
    ("kl", "weight"), [(1.6, 0.2), (1.4, 0.1), (0.7, 0.1), (0.6, 0.05), (math.nan, 0.1), (math.inf, 0.1)]
)
def test_the_weight_doubles_above_the_target_and_halves_below(kl: float, weight: float) -> None:
    assert adapted_weight(0.1, kl, target=1.0) == pytest.approx(weight)


def test_a_policy_that_answers_the_weight_ends_near_the_target() -> None:
    """KL = 1 / (4 beta), as of a quadratic gain against a quadratic penalty; within the rule's tolerance."""
    weight = 10.0
    for _ in range(20):
        weight = adapted_weight(weight, 1 / (4 * weight), target=2.0)
    assert 2.0 / 1.5 <= 1 / (4 * weight) <= 2.0 * 1.5


def test_a_target_without_a_weight_to_begin_with_is_refused() -> None:
    with pytest.raises(ValueError, match="needs kl_weight > 0"):
        PPOConfig(kl_target=1e-3)
    with pytest.raises(ValueError, match="kl_target=0.0 must be > 0"):
        PPOConfig(kl_target=0.0, kl_weight=0.1)
