"""Steering on a pretended CUDA device: every method once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from host_waits import WaitLog
from tiny_backbones import PROMPTS, brightness, on_cuda, tiny_backbone, tiny_config

from lacfast import steer
from lacfast.backbone import attach_critic
from lacfast.config import AdvantageConfig, SamplerConfig, SteeringConfig
from lacfast.rewards.heads import RewardHeads


@pytest.mark.parametrize(
    ("settings", "judged"),
    [
        ({"method": "best_of_n", "particles": 2, "selection": "reward"}, True),
        ({"method": "pruning", "particles": 4, "prune_fractions": (0.5,), "guidance_weight": 0.01}, False),
        ({"method": "beam", "particles": 2, "candidates": 2, "temperature": 0.5}, False),
        ({"method": "smc", "particles": 2, "guidance_weight": 0.01, "head_combination": "minimum"}, True),
    ],
    ids=["best_of_n", "pruning", "beam", "smc"],
)
def test_steered_images_are_on_the_device(cuda: WaitLog, settings: dict[str, Any], judged: bool) -> None:
    backbone = on_cuda(tiny_backbone("dit"))
    heads = RewardHeads.create(["brightness"], torch.ones(1), AdvantageConfig())
    attach_critic(backbone, heads, tiny_config().critic)
    assert backbone.critic is not None
    torch.nn.init.normal_(backbone.critic.head.output.weight)
    images, stats = steer(
        backbone,
        PROMPTS[:2],
        SteeringConfig(**settings),
        sampler=SamplerConfig(num_steps=4, guidance_scale=2.0),
        rewards=brightness if judged else None,
    )
    assert (len(images), images.is_cuda, stats.values.is_cuda) == (2, True, True)
    assert not any(scores.is_cuda for scores in stats.rewards.values())
