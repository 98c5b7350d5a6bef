"""Rewards on a pretended CUDA device: a model's, and those whose pictures go through the host."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from host_waits import WaitLog
from tiny_clip import save_tiny_clip

from lacfast.rewards.clip import PickScore
from lacfast.rewards.registry import RewardSet

PROMPTS = ["a cat", "two dogs", "a cat"]
METADATA: list[dict[str, Any]] = [{}] * len(PROMPTS)


@pytest.mark.parametrize("offload", [False, True])
def test_a_model_scores_where_the_images_are(cuda: WaitLog, tmp_path: Path, offload: bool) -> None:
    model = save_tiny_clip(tmp_path)
    images = torch.rand(3, 3, 40, 48, generator=torch.Generator().manual_seed(3))
    scorer = RewardSet.create([PickScore(model=model, processor=model, dtype=torch.float32, offload=offload)])
    there = scorer.score(images.cuda(), PROMPTS, METADATA)
    here = scorer.score(images, PROMPTS, METADATA)
    for name, scores in there.items():
        assert not scores.is_cuda
        torch.testing.assert_close(scores, here[name])


def test_pictures_of_the_device_are_compressed_on_the_host(cuda: WaitLog) -> None:
    images = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(3))
    scorer = RewardSet.create(["jpeg_compressibility"])
    there, here = (scorer.score(each, PROMPTS, METADATA) for each in (images.cuda(), images))
    assert torch.equal(there["jpeg_compressibility"], here["jpeg_compressibility"])
