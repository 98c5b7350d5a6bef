"""Steered images do not depend on the number of ranks."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import on_ranks
from tiny_backbones import PROMPTS, brightness, tiny_backbone
from tiny_critics import critic_of
from torch import distributed

from lacfast.config import SamplerConfig, SteeringConfig
from lacfast.distributed import World
from lacfast.prompts import PromptSet
from lacfast.rewards.heads import RewardHeads
from lacfast.steering.ranks import steer_together

pytestmark = pytest.mark.skipif(not distributed.is_available(), reason="torch is without torch.distributed")


@pytest.mark.parametrize("method", ["best_of_n", "smc"])
def test_steered_images_are_those_of_one_rank(method: Any, tmp_path: Path) -> None:
    def work() -> dict[str, Any]:
        backbone = tiny_backbone("dit")
        backbone.critic = critic_of(backbone, heads=1)
        backbone.critic.rewards = RewardHeads(("brightness",), (1.0,))
        images, stats = steer_together(
            *(World.current(), backbone, PromptSet.create(PROMPTS[:5])),
            SteeringConfig(method=method, particles=2, batch_size=2),
            sampler=SamplerConfig(num_steps=3),
            rewards=brightness,
        )
        return {"images": images, "stats": stats}

    (alone,) = on_ranks(1, work, tmp_path)
    first, second = on_ranks(2, work, tmp_path)
    torch.testing.assert_close(first["images"], alone["images"], rtol=0, atol=1e-4)
    torch.testing.assert_close(second["images"], alone["images"][3:], rtol=0, atol=1e-4)
    for found in (first, second):
        expected, stats = alone["stats"], found["stats"]
        torch.testing.assert_close(stats.values, expected.values, rtol=0, atol=1e-4)
        torch.testing.assert_close(stats.rewards, expected.rewards, rtol=0, atol=1e-4)
        assert stats.evaluations == expected.evaluations
        assert stats.reward_calls == expected.reward_calls
        assert math.isnan(stats.gradient_gain)
        assert (stats.particles is None) == (method != "smc")
