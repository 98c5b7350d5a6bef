"""The drift of typical latents sees what all images share, and passes over what only some have."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_backbones import PROMPTS, brightness, tiny_backbone, tiny_config
from torch import Tensor

from lacfast import LatentActorCriticTrainer
from lacfast.records import Evaluation
from lacfast.report.records import phase, read_metrics
from lacfast.rollout.drift import LatentDrift, typical_latents


@pytest.fixture
def latents() -> Tensor:
    return 0.1 * torch.randn(16, 4, 8, 8, generator=torch.Generator().manual_seed(0))


def drift(before: Tensor, after: Tensor) -> float:
    gauge = LatentDrift()
    first, second = (
        Evaluation({}, torch.zeros(1, 0), torch.zeros(len(each), 0), [], typical_latents(each))
        for each in (before, after)
    )
    assert gauge.update(first) == 0
    return gauge.update(second)


def test_a_grid_at_the_period_of_a_patch_is_seen_whatever_its_mean(latents: Tensor) -> None:
    grid = torch.tensor([[0.3, -0.3], [-0.3, 0.3]]).repeat(4, 4)
    assert drift(latents, latents + grid) == pytest.approx(0.3)


def test_a_tint_of_one_channel_is_seen(latents: Tensor) -> None:
    tint = torch.tensor([0.4, 0.0, 0.0, 0.0])[:, None, None]
    assert drift(latents, latents + tint) == pytest.approx(0.4 / 2)


def test_objects_at_other_places_are_hardly_seen(latents: Tensor) -> None:
    moved = latents.clone()
    latents[:, :, :4, :4] += 3
    moved[:, :, 4:, 4:] += 3
    assert drift(latents, moved) < 0.02


def test_videos_and_packed_latents_have_typical_ones_too(latents: Tensor) -> None:
    video = latents[:, :, None].expand(-1, -1, 3, -1, -1)
    torch.testing.assert_close(typical_latents(video), typical_latents(latents))
    packed = latents.unfold(2, 2, 2).unfold(3, 2, 2).permute(0, 2, 3, 1, 4, 5).reshape(16, 16, 16)
    torch.testing.assert_close(typical_latents(packed), typical_latents(latents))


def test_a_run_logs_its_drift_and_goes_on_from_the_same_first_evaluation(tmp_path: Path) -> None:
    def trainer(path: Path) -> LatentActorCriticTrainer:
        return LatentActorCriticTrainer(
            tiny_backbone("dit"), brightness, PROMPTS, tiny_config(), metrics_path=path
        )

    first = trainer(tmp_path / "first.jsonl")
    first.evaluate()
    with torch.no_grad():
        for parameter in first.backbone.policy_parameters():
            parameter.mul_(1.1)
    first.save(tmp_path / "saved")
    first.evaluate()
    second = trainer(tmp_path / "second.jsonl")
    second.load(tmp_path / "saved")
    second.evaluate()
    start, moved, again = (
        record["latent_drift"]
        for name in ("first", "second")
        for record in phase(read_metrics(tmp_path / f"{name}.jsonl"), "evaluate")
    )
    assert start == 0
    assert moved == again > 0
