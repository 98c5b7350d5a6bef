"""A run is stopped by evaluations without a better score, and by nothing else."""

from __future__ import annotations

import math

from refusals import Refusal

from lacfast.config import EarlyStoppingConfig
from lacfast.learning.early_stopping import EarlyStopping


def test_it_counts_evaluations_since_the_best() -> None:
    stopping = EarlyStopping("gold", patience=2)
    for score in (0.1, 0.3, 0.2):
        stopping.update(score)
        assert not stopping.is_exhausted
    stopping.update(0.3)
    assert stopping.is_exhausted
    assert stopping.best == 0.3


def test_a_score_that_is_no_number_is_no_better() -> None:
    stopping = EarlyStopping("gold", patience=2)
    for score in (0.5, 0.5, math.nan):
        stopping.update(score)
    assert stopping.is_exhausted
    assert stopping.best == 0.5


def test_without_patience_it_never_stops() -> None:
    stopping = EarlyStopping("gold", patience=0)
    for _ in range(100):
        stopping.update(0.0)
    assert not stopping.is_exhausted


def test_it_goes_on_from_its_state_with_its_own_patience() -> None:
    stopping, longer = EarlyStopping("gold", patience=1), EarlyStopping("gold", patience=2)
    stopping.update(1.0)
    stopping.update(0.0)
    longer.load_state_dict(stopping.state_dict())
    assert stopping.is_exhausted
    assert not longer.is_exhausted
    assert longer.best == 1.0


def test_it_watches_the_first_score_unless_another_is_named() -> None:
    known = ["reward", "gold"]
    assert EarlyStopping.create(EarlyStoppingConfig(), known).score == "reward"
    assert EarlyStopping.create(EarlyStoppingConfig(score="gold"), known).score == "gold"
    with Refusal(
        "early_stopping.score='beauty' is no score of an evaluation",
        cause="An early stop by a score that nothing measures.",
        remedy="known: reward, gold",
    ).raised():
        EarlyStopping.create(EarlyStoppingConfig(score="beauty"), known)
