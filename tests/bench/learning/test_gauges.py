"""The gauges of hacking tell pictures of the task from others."""

from __future__ import annotations

import pytest
import torch

from bench.learning.dual_encoder import train_dual_encoder
from bench.learning.gauges import frechet_distance, off_palette
from lacfast.tasks import scenes
from lacfast.tasks.shapes import ground_truth

PROMPTS = scenes.TASK.prompts()
TEXTS = [prompt.text for prompt in PROMPTS]


def test_ground_truth_has_hardly_a_pixel_off_the_palette() -> None:
    assert off_palette(ground_truth(PROMPTS)).max() == 0
    assert off_palette(torch.tensor([1.0, 0.0, 1.0]).view(1, 3, 1, 1).expand(2, 3, 32, 32)).tolist() == [1, 1]


def test_frechet_distance_of_gaussians_has_its_closed_form() -> None:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn((200_000, 2), generator=generator)
    scale = torch.tensor([2.0, 0.5])
    # |mu|^2 + sum (1 - s)^2 for diagonal covariances 1 and s^2.
    assert frechet_distance(noise, noise * scale + 3) == pytest.approx(18 + 1 + 0.25, rel=0.01)
    assert frechet_distance(noise, noise) == pytest.approx(0, abs=1e-6)


def test_pictures_far_from_the_data_have_distant_features() -> None:
    encoder = train_dual_encoder(steps=40)
    data, more = ground_truth(PROMPTS, seed=0), ground_truth(PROMPTS, seed=1)
    features, near, far = (encoder.embed_images(images) for images in (data, more, 1 - data))
    assert frechet_distance(features, far) > 5 * frechet_distance(features, near)
