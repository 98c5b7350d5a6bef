"""The value head reads tokens once, starts at zero and keeps raw predictions when the statistics change."""

from __future__ import annotations

import pytest
import torch
from tiny_backbones import PROMPTS, tiny_backbone
from torch import nn

from lacfast.backbone import build_critic
from lacfast.config import CriticConfig
from lacfast.critic.head import TapPool, ValueHead

TIMESTEPS = torch.tensor([900.0, 500.0, 100.0])


def taps(dims: tuple[int, ...] = (12, 8), tokens: int = 5) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn((3, tokens, dim), generator=generator) for dim in dims]


def trained_head(num_rewards: int = 2) -> ValueHead:
    torch.manual_seed(0)
    head = ValueHead((12, 8), num_rewards, CriticConfig(hidden_dim=16, head_dim=4, num_heads=2))
    for layer in (head.output, head.modulation, *(pool.modulation for pool in head.pools)):
        nn.init.normal_(layer.weight, std=0.3)
    return head


def test_a_new_critic_values_everything_at_zero() -> None:
    head = ValueHead((12, 8), 2, CriticConfig(), num_outputs=3)
    assert torch.equal(head(taps(), TIMESTEPS), torch.zeros(3, 2, 3))


def test_the_folded_query_is_attention_with_key_and_value_projections() -> None:
    torch.manual_seed(0)
    pool = TapPool(12, num_heads=2, head_dim=4, time_dim=6)
    nn.init.normal_(pool.modulation.weight)
    nn.init.uniform_(pool.norm_weight)
    tokens, time_embedding = taps((12,))[0], torch.randn(3, 6)
    scale, shift = pool.modulation(time_embedding).view(3, 2, 2, 4).unbind(dim=1)
    query = nn.functional.rms_norm(pool.query, (4,)) * (1 + scale) + shift
    normed = nn.functional.rms_norm(tokens, (12,), pool.norm_weight, eps=1e-6)
    keys = torch.einsum("bld,hkd->bhlk", normed, pool.key)
    values = torch.einsum("bld,hdk->bhlk", normed, pool.value)
    expected = nn.functional.scaled_dot_product_attention(query[:, :, None], keys, values, scale=12**-0.5)
    torch.testing.assert_close(pool(tokens, time_embedding), expected[:, :, 0].flatten(1))


def test_the_value_depends_on_the_timestep_and_not_on_the_order_of_tokens() -> None:
    head = trained_head()
    values = head(taps(), TIMESTEPS)
    assert not torch.allclose(values, head(taps(), TIMESTEPS.flip(0)))
    torch.testing.assert_close(values, head([tap.flip(1) for tap in taps()], TIMESTEPS))


def test_states_that_share_a_timestep_share_what_depends_on_it(monkeypatch: pytest.MonkeyPatch) -> None:
    head, runs = trained_head(), torch.tensor([900.0, 100.0])
    nn.init.normal_(head.output.weight)
    tokens = [torch.cat([tap, tap.flip(0)]) for tap in taps()]
    expected = head(tokens, runs.repeat_interleave(3))
    rows: list[int] = []
    embed = head._embed
    monkeypatch.setattr(head, "_embed", lambda timestep: rows.append(len(timestep)) or embed(timestep))
    torch.testing.assert_close(head(tokens, runs), expected)
    assert rows == [2]


@pytest.mark.parametrize("trunk", ["shared", "branch"])
def test_a_critic_takes_a_timestep_for_neighbours(trunk: str) -> None:
    backbone = tiny_backbone("dit")
    critic = build_critic(backbone, 1, CriticConfig(trunk=trunk))
    assert critic is not None
    nn.init.normal_(critic.head.output.weight)
    sample, conditioning = torch.randn(4, *backbone.latent_shape), backbone.encode_prompts(PROMPTS[:4])
    timesteps = torch.tensor([700.0, 300.0])
    with torch.no_grad(), critic.record(backbone.model) as features:
        backbone.predict(sample, timesteps.repeat_interleave(2), conditioning)
    each = critic(features, sample, timesteps.repeat_interleave(2), conditioning)
    torch.testing.assert_close(critic(features, sample, timesteps, conditioning), each)
    assert not torch.equal(each[:2], each[2:])


def test_a_head_without_time_conditioning_does_not_know_the_timestep() -> None:
    torch.manual_seed(0)
    config = CriticConfig(time_conditioning=False, hidden_dim=16, head_dim=4, num_heads=2)
    head = ValueHead((12, 8), 2, config)
    nn.init.normal_(head.output.weight)
    values = head(taps(), TIMESTEPS)
    assert values.std(dim=0).min() > 0
    assert torch.equal(values, head(taps(), TIMESTEPS.flip(0)))
    assert not [name for name, _ in head.named_parameters() if "time" in name or "modulation" in name]


def test_the_same_seed_builds_the_same_critic_and_leaves_the_global_state_alone() -> None:
    backbone = tiny_backbone("dit")
    before = torch.random.get_rng_state()
    first, second = (build_critic(backbone, 1, CriticConfig(), seed=5) for _ in range(2))
    assert first is not None
    assert second is not None
    assert torch.equal(first.head.hidden.weight, second.head.hidden.weight)
    assert torch.equal(before, torch.random.get_rng_state())


def test_bf16_features_are_valued_in_float32() -> None:
    critic = build_critic(tiny_backbone("dit"), 1, CriticConfig(trunk="shared"))
    assert critic is not None
    features = {name: torch.randn(2, 16, 48).bfloat16() for name in critic.trunk.names}
    conditioning = tiny_backbone("dit").encode_prompts(PROMPTS[:2])
    assert critic(features, torch.zeros(2, 16, 8, 8), TIMESTEPS[:2], conditioning).dtype == torch.float32
