"""The controls know what they claim to know and no more, and are asked for by name like any critic."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_backbones import FAMILIES, PROMPTS, brightness, tiny_backbone, tiny_config
from tiny_critics import (
    assert_its_gradient_reaches_the_latent,
    assert_sees_the_estimate_and_the_prompt_alone,
    critic_of,
    state,
    values,
)
from tiny_pipelines import FAMILIES as PIPELINE_FAMILIES
from tiny_pipelines import PROMPTS as PIPELINE_PROMPTS
from tiny_pipelines import backbone_of, tiny_pipeline
from tiny_rollouts import made_rollout

from bench.learning.controls import CONTROL_TRUNKS, ShuffledCritic, with_values_of_others
from lacfast import CriticConfig, load_backbone
from lacfast.advantages import AdvantageEstimator
from lacfast.backbone import build_critic
from lacfast.backbones.scheduler_choice import is_flow
from lacfast.checkpoint import save_backbone
from lacfast.config import AdvantageConfig, LoRAConfig, SamplerConfig, SteeringConfig, TrainConfig
from lacfast.steering import steer
from lacfast.trainer import LatentActorCriticTrainer

STEPS, BATCH = 4, 6
REWARD = torch.tensor([0.0, 1.0, 2.0, 3.0, 3.0, 3.0])


@pytest.mark.parametrize("family", PIPELINE_FAMILIES)
def test_prompt_only_knows_the_prompt_and_the_timestep_and_no_state(family: str) -> None:
    backbone = backbone_of(tiny_pipeline(family))
    critic = critic_of(backbone, trunk="prompt_only")
    sample, timestep = state(backbone)
    prompts = PIPELINE_PROMPTS[:3]
    value = values(backbone, critic, sample, timestep, prompts)
    assert torch.equal(value, values(backbone, critic, -sample, timestep, prompts))
    assert not torch.allclose(value, values(backbone, critic, sample, timestep.flip(0), prompts))
    assert not torch.allclose(value, values(backbone, critic, sample, timestep, PIPELINE_PROMPTS[3:6]))


def test_prompt_only_refuses_the_prompt_twice() -> None:
    config = CriticConfig(trunk="prompt_only", text_conditioning="pooled")
    with pytest.raises(ValueError, match="the prompt twice"):
        build_critic(tiny_backbone("dit"), 1, config)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_critic_on_pixels_sees_the_estimate_and_the_prompt_alone(family: str) -> None:
    backbone = tiny_backbone(family)
    critic = critic_of(backbone, trunk="pixel")
    assert_sees_the_estimate_and_the_prompt_alone(backbone, critic)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_gradient_of_a_critic_on_pixels_reaches_the_latent(family: str) -> None:
    backbone = tiny_backbone(family)
    critic = critic_of(backbone, trunk="pixel")
    assert_its_gradient_reaches_the_latent(backbone, critic)


# A UNet, a transformer and videos: of the families' code they read what every critic does.
@pytest.mark.parametrize("trunk", CONTROL_TRUNKS)
@pytest.mark.parametrize("family", ["sd15", "sd3", "wan"])
def test_every_control_values_and_learns_beside_a_lora_policy(family: str, trunk: str) -> None:
    backbone = backbone_of(tiny_pipeline(family), lora=LoRAConfig(rank=2))
    sampler = SamplerConfig(
        kind="flow_sde" if is_flow(backbone.scheduler) else "ddim",
        num_steps=3,
        noise_level=1.0,
    )
    critic = CriticConfig(trunk=trunk, hidden_dim=16, head_dim=8, num_heads=2)
    trainer = LatentActorCriticTrainer(
        backbone, brightness, PIPELINE_PROMPTS, tiny_config(batch_size=4, sampler=sampler, critic=critic)
    )
    assert trainer.critic is not None
    before = {name: tensor.detach().clone() for name, tensor in trainer.critic.named_parameters()}
    trainer.train_iteration()
    changed = [
        name for name, tensor in trainer.critic.named_parameters() if not torch.equal(before[name], tensor)
    ]
    own = [name for name in before if name.startswith("trunk.")]
    assert bool(own) == (trunk != "prompt_only")
    assert any(name.startswith("trunk.") for name in changed) == bool(own)
    assert any(name.startswith("head.") for name in changed)


def test_a_critic_that_runs_no_model_is_counted_as_free() -> None:
    backbone = tiny_backbone("dit")
    backbone.critic = critic_of(backbone, trunk="latent_net", heads=1)
    stats = steer(
        backbone,
        PROMPTS[:2],
        SteeringConfig(method="best_of_n", particles=1),
        sampler=SamplerConfig(num_steps=4),
    )[1]
    assert stats.evaluations.per_image == 4


@pytest.mark.parametrize(
    "settings",
    [{"trunk": "pixel", "loss": "hl_gauss", "num_bins": 11}, {"trunk": "prompt_only", "loss": "bce"}],
)
def test_a_saved_control_loads_as_it_was_configured(settings: dict[str, Any], tmp_path: Path) -> None:
    backbone = tiny_backbone("dit")
    backbone.critic = critic_of(backbone, **settings)
    save_backbone(backbone, tmp_path / "saved")
    loaded = load_backbone(tmp_path / "saved")
    assert loaded.critic is not None
    assert loaded.critic.config == backbone.critic.config
    sample, timestep = state(backbone)
    found = values(loaded, loaded.critic, sample, timestep, PROMPTS[:3])
    assert torch.equal(found, values(backbone, backbone.critic, sample, timestep, PROMPTS[:3]))


def test_a_shuffled_critic_gives_everybody_the_values_of_somebody_else() -> None:
    values = torch.arange(BATCH).float().expand(STEPS, -1)[..., None].contiguous()
    rollout = made_rollout(values, {"r": REWARD})
    shuffled = with_values_of_others(ShuffledCritic(), rollout).values
    assert torch.equal(shuffled, with_values_of_others(ShuffledCritic(), rollout).values)
    assert torch.equal(shuffled, shuffled[:1].expand_as(shuffled))
    assert sorted(shuffled[0, :, 0].tolist()) == values[0, :, 0].tolist()
    assert not (shuffled == values).any()
    config = TrainConfig(batch_size=BATCH, advantages=AdvantageConfig(estimator=ShuffledCritic()))
    estimator = AdvantageEstimator(config, ("r",), torch.ones(1))
    estimator.normalizer.update(REWARD[:, None])
    result = estimator(rollout)
    standardized = (REWARD - 2) / (8 / 6) ** 0.5
    torch.testing.assert_close(result.raw[..., 0], standardized - shuffled[:3, :, 0])
    # The critic itself still learns the truth.
    torch.testing.assert_close(result.targets[:, 0], standardized)


def test_a_single_trajectory_has_no_other_one() -> None:
    rollout = made_rollout(torch.zeros(STEPS, 1, 1), {"r": REWARD[:1]})
    with pytest.raises(ValueError, match="a batch of 1 has no other trajectory"):
        with_values_of_others(ShuffledCritic(), rollout)


def test_a_shuffled_critic_trains() -> None:
    config = tiny_config(advantages=AdvantageConfig(estimator=ShuffledCritic()))
    trainer = LatentActorCriticTrainer(tiny_backbone("dit"), brightness, PROMPTS, config)
    metrics = trainer.train_iteration()
    assert metrics["first_max_abs_log_ratio"] < 1e-6
    assert metrics["value_loss"] > 0
