"""Each signature of failure is seen in a run that shows it, and in no healthy one."""

from __future__ import annotations

from typing import Any

import pytest

from lacfast.report.diagnostics import calibration_slope, findings

STEPS = 4


def iteration(number: int, **changes: Any) -> dict[str, Any]:
    record = {
        "phase": "train",
        "iteration": number,
        "images": 128 * number,
        "reward/quality": 0.4 + 0.02 * number,
        "reward/size": 0.5,
        "explained_variance": [0.1, 0.3, 0.5, 0.6],
        "advantage_std/quality": [1.0] * STEPS,
        "advantage_std/size": [0.8] * STEPS,
        "advantage_correlation": [[1.0, 0.2], [0.2, 1.0]],
        "clip_fraction_high": [0.1] * STEPS,
        "clip_fraction_low": [0.05] * STEPS,
        "first_max_abs_log_ratio": 0.0,
    }
    return record | changes


def evaluation(number: int, **changes: Any) -> dict[str, Any]:
    record = {
        "phase": "evaluate",
        "iteration": number,
        "quality": 0.4 + 0.02 * number,
        "standard_error/quality": 0.01,
        "gold": 0.4 + 0.01 * number,
        "standard_error/gold": 0.01,
        "diversity": 0.2,
        "latent_drift": 0.01,
    }
    return record | changes


def run(*evaluations: dict[str, Any], **changes: Any) -> list[dict[str, Any]]:
    judged = list(evaluations) or [evaluation(0), evaluation(8)]
    return [iteration(number, **changes) for number in range(1, 9)] + judged


def titles(records: list[dict[str, Any]]) -> list[str]:
    return [finding.title for finding in findings(records)]


def test_a_healthy_run_shows_nothing() -> None:
    assert titles(run()) == []


def test_a_run_that_has_not_begun_shows_nothing() -> None:
    assert titles([]) == []
    assert titles([{"phase": "train", "iteration": 1, "skipped": True}]) == []


@pytest.mark.parametrize(
    ("changes", "title"),
    [
        ({"first_max_abs_log_ratio": 3e-5}, "The first ratio is not 1"),
        ({"bad_gradients/policy": 2}, "Steps of the policy were left out"),
        ({"explained_variance": [0.0, 0.01, -0.05, 0.02]}, "The critic is at its floor"),
        (
            {"explained_variance": [0.3] * STEPS, "explained_variance_floor": 0.29},
            "The critic is at its floor",
        ),
        ({"clip_fraction_high": [0.0] * STEPS, "clip_fraction_low": [0.0] * STEPS}, "The clip is inert"),
        ({"clip_fraction_high": [0.7] * STEPS}, "Most pairs are clipped"),
        ({"advantage_correlation": [[1.0, -0.6], [-0.6, 1.0]]}, "Two rewards fight"),
        ({"advantage_std/size": [0.01] * STEPS}, "One reward dominates"),
        ({"zero_std_groups": 20, "groups": 24}, "Most groups teach nothing"),
    ],
)
def test_a_signature_in_the_training_is_seen(changes: dict[str, Any], title: str) -> None:
    assert titles(run(**changes)) == [title]


def test_a_gold_score_that_falls_while_the_reward_stands_is_hacking() -> None:
    (found,) = findings(run(evaluation(0), evaluation(4, gold=0.6), evaluation(8, gold=0.45)))
    assert found.title == "The reward is being hacked"
    assert "iteration 4" in found.evidence
    assert found.iteration == 8


def test_a_fall_within_the_noise_is_not_hacking() -> None:
    assert titles(run(evaluation(4, gold=0.50), evaluation(8, gold=0.48))) == []


def test_a_gold_score_that_falls_with_the_reward_is_not_hacking() -> None:
    assert titles(run(evaluation(4, quality=0.7, gold=0.6), evaluation(8, quality=0.4, gold=0.4))) == []


def test_a_policy_that_draws_one_picture_has_collapsed() -> None:
    assert titles(run(evaluation(0), evaluation(8, diversity=0.05))) == ["The policy collapses"]


def test_every_finding_says_what_to_do() -> None:
    for finding in findings(run(first_max_abs_log_ratio=1.0, zero_std_groups=24, groups=24)):
        assert len(finding.remedy) > 20
        assert not finding.remedy.endswith(".")


def test_missing_numbers_are_not_taken_for_failure() -> None:
    bare = [{"phase": "train", "iteration": 1, "images": 4, "reward/quality": 0.5}]
    assert titles(bare) == []


def test_steps_without_pairs_do_not_count() -> None:
    gaps = {"clip_fraction_high": [float("nan"), 0.2, None, 0.1]}
    assert titles(run(**gaps)) == []


def calibrated(slope: float) -> dict[str, Any]:
    values = [-1.0, -0.5, 0.0, 0.5, 1.0]
    return {"calibration/quality": [values, [slope * value for value in values], [0.05] * 5]}


def test_a_critic_whose_differences_are_mostly_invented_is_named_with_its_slope() -> None:
    found = findings(run(evaluation(0), evaluation(8, **calibrated(0.2))))
    assert [finding.title for finding in found] == ["The critic is overconfident"]
    assert "differ by 0.20 ± 0.03" in found[0].evidence
    assert titles(run(evaluation(0), evaluation(8, **calibrated(0.8)))) == []


def test_the_slope_of_bins_is_that_of_least_squares_with_its_error() -> None:
    slope, error = calibration_slope(calibrated(0.7)["calibration/quality"])
    assert slope == pytest.approx(0.7)
    assert error == pytest.approx(0.05 / 2.5**0.5)
    # A critic that predicts a constant has no slope, and is not called overconfident.
    constant = {"calibration/quality": [[0.0] * 3, [0.1, 0.2, 0.3], [0.1, None, 0.1]]}
    assert titles(run(evaluation(0), evaluation(8, **constant))) == []
