"""The gauge of the ground sees what no checker looks at, and nothing of what they judge."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lacfast.tasks.background import INK, background_distance
from lacfast.tasks.codec import fit_codec
from lacfast.tasks.scenes import BACKGROUND
from lacfast.tasks.shapes import ground_truth, held_out_prompts, shapes_background, shapes_strict

PROMPTS = held_out_prompts()
METADATA = [prompt.metadata for prompt in PROMPTS]


@pytest.fixture(scope="module")
def pictures() -> Tensor:
    return ground_truth(PROMPTS)


def test_the_tasks_own_pictures_have_none_and_the_codec_adds_little(pictures: Tensor) -> None:
    assert background_distance(pictures, BACKGROUND).max() == 0
    codec = fit_codec()
    assert background_distance(codec.decode(codec.encode(pictures)), BACKGROUND).mean() < 2.1 / 255


def test_a_faint_grid_is_its_amplitude_and_no_checker_sees_it(pictures: Tensor) -> None:
    amplitude = 5 / 255
    lines = torch.where(torch.arange(32) % 4 < 2, amplitude, -amplitude)
    grid = pictures + lines[:, None] * torch.tensor([1.0, 0.0, -1.0])[:, None, None]
    assert torch.equal(shapes_strict(grid, [], METADATA), shapes_strict(pictures, [], METADATA))
    expected = torch.full((len(PROMPTS),), amplitude * (2 / 3) ** 0.5)
    torch.testing.assert_close(background_distance(grid, BACKGROUND), expected)
    torch.testing.assert_close(shapes_background(grid, [], METADATA), -expected)


def test_other_objects_are_no_drift(pictures: Tensor) -> None:
    assert background_distance(ground_truth(PROMPTS, seed=5), BACKGROUND).max() == 0


def test_larger_pictures_are_gauged_alike(pictures: Tensor) -> None:
    large = pictures.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    one, two = (background_distance(each + 0.01, BACKGROUND) for each in (pictures, large))
    torch.testing.assert_close(two, one)


def test_a_picture_without_ground_has_the_largest_distance() -> None:
    assert background_distance(torch.zeros(2, 3, 32, 32), BACKGROUND).tolist() == pytest.approx([INK] * 2)
