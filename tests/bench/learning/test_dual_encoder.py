"""The dual encoder learns which picture a prompt describes, is saved whole, and is a reward."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bench.learning.dual_encoder import DualEncoder, SimilarityReward, train_dual_encoder
from lacfast.rewards.registry import RewardSet
from lacfast.tasks import scenes
from lacfast.tasks.shapes import ground_truth

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


def test_an_encoder_of_larger_pictures_survives_its_files(tmp_path: Path) -> None:
    encoder = train_dual_encoder(scenes.task(2), steps=1)
    encoder.save_pretrained(tmp_path)
    images = torch.rand(2, 3, 64, 64)
    loaded = DualEncoder.from_pretrained(tmp_path)
    assert torch.equal(loaded.embed_images(images), encoder.embed_images(images))
