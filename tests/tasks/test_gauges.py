"""The dual encoder, the gauges of hacking, and the reward whose range lies inside the data."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lacfast.rewards.registry import RewardSet
from lacfast.tasks import scenes
from lacfast.tasks.dual_encoder import DualEncoder, SimilarityReward, train_dual_encoder
from lacfast.tasks.gauges import frechet_distance, off_palette
from lacfast.tasks.scenes import PlacedObject, render
from lacfast.tasks.shapes import ground_truth, shapes_height

PROMPTS = scenes.TASK.prompts()
TEXTS = [prompt.text for prompt in PROMPTS]


@pytest.fixture(scope="module")
def encoder() -> DualEncoder:
    return train_dual_encoder(steps=40)


def test_the_encoder_prefers_the_picture_of_its_prompt(encoder: DualEncoder) -> None:
    images = ground_truth(PROMPTS, seed=3)
    own = encoder.score(images, TEXTS).mean()
    other = encoder.score(images, TEXTS[150:] + TEXTS[:150]).mean()
    assert own > other + 0.2


def test_training_is_a_function_of_its_seed(encoder: DualEncoder) -> None:
    first, second = (train_dual_encoder(steps=2, seed=seed) for seed in (5, 5))
    other = train_dual_encoder(steps=2, seed=6)
    images = ground_truth(PROMPTS[:4])
    assert torch.equal(first.embed_images(images), second.embed_images(images))
    assert not torch.equal(first.embed_images(images), other.embed_images(images))


def test_a_saved_encoder_scores_the_same(encoder: DualEncoder, tmp_path: Path) -> None:
    encoder.save_pretrained(tmp_path)
    images = ground_truth(PROMPTS[:8])
    loaded = DualEncoder.from_pretrained(tmp_path)
    assert torch.equal(loaded.score(images, TEXTS[:8]), encoder.score(images, TEXTS[:8]))


def test_the_encoder_is_a_reward_with_a_name(encoder: DualEncoder) -> None:
    rewards = RewardSet.create([SimilarityReward(encoder, "similarity")])
    assert rewards.names == ["similarity"]
    assert rewards.score(ground_truth(PROMPTS[:3]), TEXTS[:3], [{}] * 3)["similarity"].shape == (3,)


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


def test_pictures_far_from_the_data_have_distant_features(encoder: DualEncoder) -> None:
    data, more = ground_truth(PROMPTS, seed=0), ground_truth(PROMPTS, seed=1)
    features, near, far = (encoder.embed_images(images) for images in (data, more, 1 - data))
    assert frechet_distance(features, far) > 5 * frechet_distance(features, near)


def test_height_is_that_of_the_ink() -> None:
    top, bottom = (torch.from_numpy(render([PlacedObject("red", "square", row, 0)])) for row in (0, 1))
    images = torch.stack([top, bottom, torch.full((3, 32, 32), scenes.BACKGROUND)])
    scores = shapes_height(images, [], [])
    # The centres of the cells' objects lie at 7.5 and 23.5 of 31 pixels.
    assert scores.tolist() == pytest.approx([1 - 7.5 / 31, 1 - 23.5 / 31, 0.0], abs=1e-3)
