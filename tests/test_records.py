"""What an evaluation tells besides its means."""

from __future__ import annotations

import math

import pytest
import torch

from lacfast.records import Evaluation


def evaluation(prompts: list[str]) -> Evaluation:
    images = torch.stack([torch.full((3, 4, 4), value) for value in (0.0, 0.2, 0.6, 0.9)])
    return Evaluation({"score": torch.tensor([0.0, 1.0, 1.0, 0.0])}, torch.zeros(2, 0), images, prompts)


def test_diversity_is_the_mean_distance_within_a_prompt() -> None:
    # One prompt has the pairs 0.2, 0.6 and 0.4; the other image stands alone.
    assert evaluation(["a", "a", "a", "b"]).diversity() == pytest.approx(0.4)
    assert math.isnan(evaluation(["a", "b", "c", "d"]).diversity())


def test_standard_errors_are_those_of_the_mean() -> None:
    expected = math.sqrt(1 / 3) / math.sqrt(4)
    assert evaluation(["a"] * 4).standard_errors() == {"score": pytest.approx(expected)}
