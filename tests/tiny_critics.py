"""Small critics of tiny backbones, whose values depend on all that they read."""

from __future__ import annotations

import torch
from tiny_backbones import PROMPTS
from torch import Tensor, nn

from lacfast import CriticConfig
from lacfast.backbone import build_critic
from lacfast.backbones.latent import LatentBackbone
from lacfast.critic.critic import Critic

SMALL = {"hidden_dim": 16, "head_dim": 8, "num_heads": 2}


def critic_of(backbone: LatentBackbone, *, heads: int = 2, **changes: object) -> Critic:
    """A critic whose zero-initialised layers are drawn, so that its values depend on what it reads."""
    critic = build_critic(backbone, heads, CriticConfig(**{**SMALL, **changes}))  # type: ignore[arg-type]
    assert critic is not None
    generator = torch.Generator().manual_seed(0)
    for module in critic.modules():
        if isinstance(module, nn.Linear) and not module.weight.any():
            nn.init.normal_(module.weight, std=0.5, generator=generator)
    return critic


def state(backbone: LatentBackbone, count: int = 3) -> tuple[Tensor, Tensor]:
    sample = torch.randn((count, *backbone.latent_shape), generator=torch.Generator().manual_seed(1))
    return sample, torch.linspace(900, 100, count).round()


@torch.no_grad()
def values(
    backbone: LatentBackbone, critic: Critic, sample: Tensor, timestep: Tensor, prompts: list[str]
) -> Tensor:
    conditioning = backbone.encode_prompts(prompts)
    with critic.record(backbone.model) as features:
        backbone.predict(sample, timestep, conditioning)
    result: Tensor = critic(features, sample, timestep, conditioning)
    return result


def assert_sees_the_estimate_and_the_prompt_alone(backbone: LatentBackbone, critic: Critic) -> None:
    """States of one estimate of the clean latent have one value, others another."""
    sample, timestep = state(backbone)
    conditioning = backbone.encode_prompts(PROMPTS[:3])
    output = torch.randn(sample.shape, generator=torch.Generator().manual_seed(2))
    move = torch.randn(sample.shape, generator=torch.Generator().manual_seed(3))
    sigma = (timestep / 1000)[:, None, None, None]
    with torch.no_grad():
        value = critic({"model_output": output}, sample, timestep, conditioning)
        same = critic({"model_output": output + move / sigma}, sample + move, timestep, conditioning)
        other = critic({"model_output": output}, sample + move, timestep, conditioning)
        others = backbone.encode_prompts(PROMPTS[3:6])
        another_prompt = critic({"model_output": output}, sample, timestep, others)
    torch.testing.assert_close(value, same, atol=1e-4, rtol=1e-3)
    assert not torch.allclose(value, other, atol=1e-3)
    assert not torch.allclose(value, another_prompt, atol=1e-3)


def assert_its_gradient_reaches_the_latent(backbone: LatentBackbone, critic: Critic) -> None:
    sample, timestep = state(backbone)
    # Small latents: the codec's clamp to [0, 1] has no gradient outside.
    sample = (0.1 * sample).requires_grad_()
    conditioning = backbone.encode_prompts(PROMPTS[:3])
    with critic.record(backbone.model, detach=False) as features:
        backbone.predict(sample, timestep, conditioning)
    (gradient,) = torch.autograd.grad(critic(features, sample, timestep, conditioning).sum(), sample)
    assert (gradient.flatten(1).norm(dim=1) > 0).all()
