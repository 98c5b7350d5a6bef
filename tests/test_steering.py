"""Steering follows the critic, counts what it costs and stops when the critic's gradient misleads."""

from __future__ import annotations

from contextlib import AbstractContextManager

import pytest
import torch
from tiny_backbones import PROMPTS, tiny_backbone
from torch import Tensor, nn

from lacfast import steer
from lacfast.backbones.latent import LatentBackbone
from lacfast.backbones.taps import record_taps
from lacfast.config import CriticConfig, SamplerConfig, SteeringConfig
from lacfast.critic import build_critic
from lacfast.protocols import Features, Trunk
from lacfast.records import Conditioning, NoiseKey
from lacfast.sampler import sample_rollout

SAMPLER = SamplerConfig(num_steps=8)


class LatentMean(nn.Module):
    """A critic in closed form: V is the mean of the noisy latent, so its gradient is the same everywhere."""

    num_rewards = 1

    def __init__(self, sign: float = 1.0) -> None:
        super().__init__()
        self.sign = sign
        self.trunk = Trunk()

    def record(self, model: nn.Module, *, detach: bool = True) -> AbstractContextManager[Features]:
        return record_taps(model, [], detach=detach)

    def forward(
        self, features: Features, sample: Tensor, timestep: Tensor, conditioning: Conditioning
    ) -> Tensor:
        return self.sign * sample.mean(dim=(1, 2, 3), keepdim=True)[:, 0, 0]


def backbone_with(critic: nn.Module | None) -> LatentBackbone:
    backbone = tiny_backbone("dit")
    backbone.critic = critic  # type: ignore[assignment]
    return backbone


def final_values(backbone: LatentBackbone, config: SteeringConfig) -> Tensor:
    return steer(backbone, PROMPTS, config, sampler=SAMPLER)[1].values[-1]


def test_pruning_costs_what_it_says_and_raises_the_value() -> None:
    backbone = backbone_with(LatentMean())
    images, stats = steer(backbone, PROMPTS, SteeringConfig(particles=4), sampler=SAMPLER)
    # 4 particles at steps 0 to 4, 2 at steps 5 and 6, 1 at step 7.
    assert stats.forwards_per_image == 4 * 5 + 2 * 2 + 1
    assert images.shape == (len(PROMPTS), 3, 32, 32)
    assert stats.values.shape == (8, len(PROMPTS))
    alone = final_values(backbone, SteeringConfig(particles=1))
    assert float(stats.values[-1].mean()) > float(alone.mean())


def test_one_particle_without_guidance_is_plain_sampling() -> None:
    backbone = backbone_with(LatentMean())
    images, stats = steer(backbone, PROMPTS[:3], SteeringConfig(particles=1), sampler=SAMPLER)
    table = backbone.transition_table(SAMPLER)
    rollout = sample_rollout(backbone, None, table, PROMPTS[:3], [{}] * 3, NoiseKey.create(0, range(3)))
    assert torch.equal(images, backbone.decode(rollout.clean_latents))
    assert stats.forwards_per_image == 8


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_guidance_moves_the_latents_up_the_value_whatever_its_sign(sign: float) -> None:
    backbone = backbone_with(LatentMean(sign))
    plain = final_values(backbone, SteeringConfig(particles=1))
    _, stats = steer(backbone, PROMPTS, SteeringConfig(particles=1, guidance_weight=0.3), sampler=SAMPLER)
    assert float(stats.values[-1].mean()) > float(plain.mean()) + 0.01
    assert stats.gradient_gain > 0
    # Steps at sigma 0.875 to 0.25 lie in the window: 6 of 3 forwards, 2 of one, and the sign test's one.
    assert stats.forwards_per_image == 6 * 3 + 2 + 1


def test_the_gradient_of_a_real_critic_passes_its_sign_test() -> None:
    backbone = tiny_backbone("dit")
    critic = build_critic(backbone, 2, CriticConfig())
    assert critic is not None
    nn.init.normal_(critic.head.output.weight)
    backbone.critic = critic
    stats = steer(backbone, PROMPTS, SteeringConfig(particles=1, guidance_weight=0.1), sampler=SAMPLER)[1]
    assert stats.gradient_gain > 0
    assert all(parameter.grad is None for parameter in backbone.model.parameters())


class Cliff(LatentMean):
    """Its gradient points up, its value falls: the gradient is not of the function that it reports."""

    def forward(
        self, features: Features, sample: Tensor, timestep: Tensor, conditioning: Conditioning
    ) -> Tensor:
        value = super().forward(features, sample, timestep, conditioning)
        return value if torch.is_grad_enabled() else -value


def test_a_gradient_that_lowers_the_value_is_refused() -> None:
    with pytest.raises(
        ValueError, match="along its own gradient, so it cannot guide; train the critic longer or use pruning"
    ):
        steer(
            backbone_with(Cliff()),
            PROMPTS[:2],
            SteeringConfig(particles=1, guidance_weight=0.1),
            sampler=SAMPLER,
        )


def test_images_do_not_depend_on_the_batch_size() -> None:
    backbone = backbone_with(LatentMean())
    whole = steer(backbone, PROMPTS, SteeringConfig(particles=2), sampler=SAMPLER)[0]
    parts = steer(backbone, PROMPTS, SteeringConfig(particles=2, batch_size=3), sampler=SAMPLER)[0]
    torch.testing.assert_close(whole, parts, rtol=1e-4, atol=1e-4)


def test_guidance_that_would_be_ignored_is_refused() -> None:
    with pytest.raises(ValueError, match=r"guidance_scale=3\.0 would be ignored"):
        steer(tiny_backbone("dit"), PROMPTS, sampler=SamplerConfig(num_steps=4, guidance_scale=3.0))


def test_steering_without_a_critic_is_refused() -> None:
    with pytest.raises(ValueError, match="steering needs a critic; load a backbone that was saved with one"):
        steer(backbone_with(None), PROMPTS, sampler=SAMPLER)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"particles": 3}, "particles=3 must be a power of two"),
        ({"guidance_weight": -1.0}, "guidance_weight=-1.0"),
        ({"guidance_window": (0.9, 0.2)}, "guidance_window"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SteeringConfig(**settings)  # type: ignore[arg-type]
