"""Small critics of tiny backbones, whose values depend on all that they read."""

from __future__ import annotations

import torch
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
