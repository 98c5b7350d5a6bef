"""What a rollout's metrics say about the critic."""

from __future__ import annotations

import math

import pytest
import torch

from lacfast.critic.values import rollout_variance
from lacfast.metrics import diversity, evaluation_metrics, rollout_metrics
from lacfast.records import Advantages, Evaluation
from lacfast.rewards.normalizer import RewardNormalizer
from lacfast.rollout.scored import reliability
from tests.tiny_rollouts import made_rollout

REWARDS = torch.tensor([3.0, 5.0, 1.0, 7.0])


def metrics_of(scale: float) -> dict[str, object]:
    """Of values that are `scale` times the standardised rewards, at all of three trained steps."""
    normalizer = RewardNormalizer.create(1)
    normalizer.update(REWARDS[:, None])
    values = scale * normalizer.standardize(REWARDS[:, None]).float().expand(4, -1, -1)
    steps = torch.arange(3)
    raw = torch.zeros(3, 4, 1)
    advantages = Advantages(steps, raw[..., 0], values[0], raw)
    rollout = made_rollout(values, {"score": REWARDS})
    return rollout_metrics(rollout, advantages, normalizer, rollout_variance(rollout, normalizer))


@pytest.mark.parametrize("scale", [0.5, 1.0, 2.0])
def test_the_slope_tells_overconfident_values_from_timid_ones(scale: float) -> None:
    slope = metrics_of(scale)["value_slope"]
    assert isinstance(slope, torch.Tensor)
    torch.testing.assert_close(slope, torch.full((4,), 1 / scale))


def test_the_raw_value_loss_is_in_the_rewards_units() -> None:
    # Half of the deviation is missed: a quarter of the variance, which is 5 here.
    assert metrics_of(0.5)["value_loss_raw"] == pytest.approx(5 / 4)


IMAGES = torch.stack([torch.full((3, 4, 4), value) for value in (0.0, 0.2, 0.6, 0.9)])


def test_diversity_is_the_mean_distance_within_a_prompt() -> None:
    # One prompt has the pairs 0.2, 0.6 and 0.4; the other image stands alone.
    assert diversity(IMAGES, ["a", "a", "a", "b"]) == pytest.approx(0.4)
    assert math.isnan(diversity(IMAGES, ["a", "b", "c", "d"]))


def test_an_evaluation_logs_means_with_the_standard_errors_of_means() -> None:
    scores = {"score": torch.tensor([0.0, 1.0, 1.0, 0.0])}
    logged = evaluation_metrics(Evaluation(scores, torch.zeros(2, 0), IMAGES, ["a"] * 4, torch.zeros(4, 1)))
    assert logged["score"] == 0.5
    assert logged["standard_error/score"] == pytest.approx(math.sqrt(1 / 3) / math.sqrt(4))


def test_reliability_bins_hold_as_many_states_each_and_errors_count_trajectories() -> None:
    # 40 trajectories of 5 states: values are known, returns are twice as far out.
    returns = torch.arange(40.0)
    values = (returns / 2)[:, None].expand(40, 5)
    bins = reliability(values, returns, bins=4)
    torch.testing.assert_close(bins[1], torch.tensor([4.5, 14.5, 24.5, 34.5]))
    torch.testing.assert_close(bins[0], bins[1] / 2)
    # Ten trajectories per bin, whatever the steps.
    torch.testing.assert_close(bins[2], torch.full((4,), float(torch.arange(10.0).std()) / 10**0.5))
    assert reliability(values[:2, :1], returns[:2]).shape == (3, 2)


def test_an_evaluation_logs_the_calibration_of_every_head() -> None:
    calibration = {"score": torch.tensor([[0.0, 1.0], [0.1, 0.8], [0.01, 0.01]])}
    scores = {"score": torch.tensor([0.0, 1.0, 1.0, 0.0])}
    evaluation = Evaluation(scores, torch.zeros(2, 1), IMAGES, ["a"] * 4, torch.zeros(4, 1), calibration)
    logged = evaluation_metrics(evaluation)
    assert torch.equal(logged["calibration/score"], calibration["score"])
