"""lambda below 1 is used only where the critic is known to explain enough."""

from __future__ import annotations

import pytest
import torch

from lacfast.learning.value_bounds import ValueBounds
from lacfast.learning.value_confidence import ValueConfidence

VARIANCE = torch.tensor([[0.1, 0.3], [0.5, 0.5], [0.9, 0.7]]).double()
BOUNDS = ValueBounds(torch.tensor([0.1, 0.3]), torch.tensor([[0.1, 0.3], [0.9, 0.7], [1.0, 1.0]]), 12)


def test_nothing_is_trusted_before_anything_is_known() -> None:
    assert torch.equal(ValueConfidence().gated_lambda(0.9, 0.0, 3), torch.ones(3))


def test_without_bounds_the_score_is_the_explained_variance() -> None:
    confidence = ValueConfidence(explained_variance=VARIANCE)
    torch.testing.assert_close(confidence.scores(3), torch.tensor([0.2, 0.5, 0.8]).double())
    torch.testing.assert_close(confidence.gated_lambda(0.9, 0.5, 3), torch.tensor([1.0, 0.9, 0.9]))


def test_with_bounds_a_step_where_floor_and_ceiling_meet_is_not_trusted() -> None:
    scores = ValueConfidence(BOUNDS, VARIANCE).scores(3)
    assert scores[0] == -torch.inf
    assert float(scores[1]) == pytest.approx((0.4 / 0.8 + 0.2 / 0.4) / 2)


def test_a_rollout_moves_the_average_by_its_share() -> None:
    confidence = ValueConfidence(explained_variance=VARIANCE)
    confidence.update(VARIANCE.float() + 0.5)
    torch.testing.assert_close(confidence.explained_variance, VARIANCE + 0.1, check_dtype=False)


def test_a_variance_that_is_not_finite_leaves_the_average_of_its_step() -> None:
    confidence = ValueConfidence(explained_variance=VARIANCE)
    fresh = VARIANCE + 0.5
    fresh[1, 0] = torch.nan
    confidence.update(fresh)
    expected = VARIANCE + 0.1
    expected[1, 0] = VARIANCE[1, 0]
    torch.testing.assert_close(confidence.explained_variance, expected)


def test_the_state_is_what_the_next_run_goes_on_from() -> None:
    other = ValueConfidence()
    other.load_state_dict(ValueConfidence(BOUNDS, VARIANCE).state_dict())
    torch.testing.assert_close(other.scores(3), ValueConfidence(BOUNDS, VARIANCE).scores(3))
    assert other.bounds is not None
    assert other.bounds.images == 12


def test_bounds_of_an_earlier_checkpoint_load() -> None:
    state = ValueConfidence(BOUNDS, VARIANCE).state_dict()
    state["bounds"]["steps"] = [0, 1]
    other = ValueConfidence()
    other.load_state_dict(state)
    assert other.bounds is not None
    assert torch.equal(other.bounds.ceiling, BOUNDS.ceiling)
