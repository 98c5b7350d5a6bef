"""The plan of decoding is what decoding takes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tiny_pipelines import backbone_of, tiny_pipeline
from torch import Tensor

from lacfast.config import TrainConfig
from lacfast.rewards.frames import judged_frames
from lacfast.runs.costs import LiveBytes
from lacfast.runs.sampled import Subject


@torch.no_grad()
def followed(body: Callable[[], Tensor]) -> tuple[int, Tensor]:
    live = LiveBytes()
    with live:
        result = body()
    return live.peak["cpu"], result


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("family", ["wan", "sd3"])
def test_what_is_foretold_of_a_batch_is_what_it_takes(family: str, count: int) -> None:
    backbone = backbone_of(tiny_pipeline(family))
    latents = torch.randn(count, *backbone.latent_shape)
    found = Subject(backbone, None, backbone.any_prompt(), TrainConfig()).decoded(latents)
    peak, images = followed(lambda: backbone.decode(latents))
    assert found.images == images.nbytes
    assert found.kept == judged_frames(images, backbone.judged_frames or 1).nbytes
    # The first of several is held until there is room for all.
    assert peak <= found.peak <= peak + images.nbytes // count
