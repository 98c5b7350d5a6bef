"""Adapters call diffusers' models as they are, and trunks read them without changing them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from tiny_backbones import FAMILIES, PROMPTS, tiny_backbone
from torch import nn

from lacfast import load_backbone
from lacfast.backbone import build_critic
from lacfast.backbones import adapt
from lacfast.backbones.taps import THIRDS, Tap, blocks_at, record_taps
from lacfast.checkpoint import save_backbone
from lacfast.config import CriticConfig, SamplerConfig
from lacfast.schedule import uniform_sigmas


@pytest.fixture(params=FAMILIES)
def backbone(request: pytest.FixtureRequest):
    return tiny_backbone(request.param)


def states(backbone, batch: int = 3):
    sample = torch.randn((batch, *backbone.latent_shape), generator=torch.Generator().manual_seed(1))
    return sample, torch.linspace(900, 100, batch), backbone.encode_prompts(PROMPTS[:batch])


def test_the_output_depends_on_sample_timestep_and_prompt(backbone) -> None:
    sample, timestep, conditioning = states(backbone)
    with torch.no_grad():
        output = backbone.predict(sample, timestep, conditioning)
        others = [
            backbone.predict(sample + 1, timestep, conditioning),
            backbone.predict(sample, timestep / 2, conditioning),
            backbone.predict(sample, timestep, conditioning.select(torch.tensor([1, 2, 0]))),
        ]
    assert output.shape == sample.shape
    for other in others:
        assert not torch.allclose(output, other)


@pytest.mark.parametrize("trunk", ["branch", "shared", "copy"])
def test_recording_leaves_the_output_and_the_model_as_they_were(backbone, trunk: str) -> None:
    sample, timestep, conditioning = states(backbone)
    critic = build_critic(backbone, 2, CriticConfig(trunk=trunk))
    assert critic is not None
    with torch.no_grad():
        plain = backbone.predict(sample, timestep, conditioning)
        with critic.record(backbone.model) as features:
            recorded = backbone.predict(sample, timestep, conditioning)
        values = critic(features, sample, timestep, conditioning)
    assert torch.equal(plain, recorded)
    assert values.shape == (3, 2)
    assert all(not module._forward_hooks for module in backbone.model.modules())


def test_an_untrained_branch_continues_the_actor_exactly(backbone) -> None:
    """Its blocks are copies of the actor's, so its last tap is the actor's own activation there."""
    sample, timestep, conditioning = states(backbone)
    trunk = backbone.branch_trunk(1)
    block = "transformer_blocks.1" if hasattr(backbone.model, "transformer_blocks") else "up_blocks.0"

    def read(arguments, output):
        tokens = output[1] if isinstance(output, tuple) else output.flatten(2).mT
        return {"actor": tokens}

    with (
        torch.no_grad(),
        record_taps(backbone.model, [Tap(block, read)]) as actor,
        trunk.record(backbone.model) as features,
    ):
        backbone.predict(sample, timestep, conditioning)
        taps = trunk(features, sample, timestep, conditioning)
    torch.testing.assert_close(taps[-1], actor["actor"])
    assert tuple(tap.shape[-1] for tap in taps) == trunk.tap_dims


def test_a_critic_on_detached_features_leaves_the_actor_without_gradient(backbone) -> None:
    sample, timestep, conditioning = states(backbone)
    critic = build_critic(backbone, 1, CriticConfig())
    assert critic is not None
    nn.init.normal_(critic.head.output.weight)
    with critic.record(backbone.model) as features:
        backbone.predict(sample, timestep, conditioning)
    critic(features, sample, timestep, conditioning).sum().backward()
    assert all(parameter.grad is None for parameter in backbone.model.parameters())
    assert all(parameter.grad is not None for parameter in critic.head.pools.parameters())


def test_a_saved_backbone_loads_with_its_critic(backbone, tmp_path: Path) -> None:
    backbone.critic = build_critic(backbone, 2, CriticConfig(num_heads=2))
    nn.init.normal_(backbone.critic.head.output.weight)
    save_backbone(backbone, tmp_path / "saved")
    loaded = load_backbone(tmp_path / "saved")
    sample, timestep, conditioning = states(backbone)
    with torch.no_grad():
        for one in (backbone, loaded):
            with one.critic.record(one.model) as features:
                one.output = one.predict(sample, timestep, one.encode_prompts(PROMPTS[:3]))
            one.values = one.critic(features, sample, timestep, conditioning)
    assert torch.equal(backbone.output, loaded.output)
    assert torch.equal(backbone.values, loaded.values)
    assert torch.equal(backbone.decode(sample), loaded.decode(sample))


def test_loading_leaves_the_random_state_alone(backbone, tmp_path: Path) -> None:
    save_backbone(backbone, tmp_path / "saved")
    before = torch.get_rng_state()
    load_backbone(tmp_path / "saved")
    assert torch.equal(torch.get_rng_state(), before)


def test_taps_lie_at_the_thirds_of_the_depth() -> None:
    assert blocks_at(24, THIRDS) == [7, 15, 23]
    assert blocks_at(3, THIRDS) == [0, 1, 2]
    assert blocks_at(24, (1.0, 0.5, 0.01)) == [0, 11, 23]
    assert blocks_at(2, (0.1, 0.2)) == [0]


def test_bad_input_gets_one_error_with_value_and_remedy(tmp_path: Path) -> None:
    backbone = tiny_backbone("dit")
    missing = Tap("blocks.9", lambda arguments, output: {})
    message = r"no module 'blocks\.9' to tap; known at that depth: .*transformer_blocks\.0"
    with pytest.raises(ValueError, match=message), record_taps(backbone.model, [missing]):
        pass
    with pytest.raises(ValueError, match=r"num_blocks=9 .* exceeds the model's 2 blocks"):
        build_critic(backbone, 1, CriticConfig(num_blocks=9))
    with pytest.raises(ValueError, match="no backbone for Linear; known: SD3Transformer2DModel"):
        adapt(nn.Linear(1, 1), backbone.prompt_encoder, backbone.codec, latent_shape=(1, 1, 1))
    with pytest.raises(ValueError, match=r"holds no model_index\.json, model/config\.json"):
        load_backbone(tmp_path)
    backbone.model.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match=r"no config\.json in .*text; give a directory written by"):
        load_backbone(tmp_path)


def test_a_scheduler_sets_the_noise_levels_and_a_shift_takes_their_place() -> None:
    backbone = tiny_backbone("dit")
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    adapted = adapt(
        backbone.model,
        backbone.prompt_encoder,
        backbone.codec,
        latent_shape=backbone.latent_shape,
        scheduler=scheduler,
    )
    table = adapted.transition_table(SamplerConfig(num_steps=4))
    scheduler.set_timesteps(4)
    torch.testing.assert_close(table.timesteps, scheduler.timesteps)
    shifted = adapted.transition_table(SamplerConfig(num_steps=4, shift=2.0))
    assert torch.equal(shifted.sigmas, uniform_sigmas(4, shift=2.0))
