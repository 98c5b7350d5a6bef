"""What a critic reads: depths of taps, the prompt, decoded pictures; and that its file says so."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler
from safetensors.torch import load_file, save_file
from tiny_backbones import FAMILIES, PROMPTS, tiny_backbone
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
from torch import Tensor

from lacfast import CriticConfig, load_backbone
from lacfast.backbones.estimate_trunks import CLEAN_CHANNELS, MAP_SIDE, CleanEstimate, CleanNetTrunk
from lacfast.backbones.prompt_trunks import pooled_prompt
from lacfast.backbones.trunks import OwnForwardTrunk
from lacfast.checkpoint import CRITIC_WEIGHTS, EARLIER_DESCRIPTION, save_backbone
from lacfast.critic.trunk import Features, register_trunk
from lacfast.records import Conditioning
from lacfast.runtime.directories import MANIFEST


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_the_clean_estimate_is_that_of_diffusers_scheduler(prediction_type: str) -> None:
    scheduler = DDIMScheduler(prediction_type=prediction_type, clip_sample=False)
    scheduler.set_timesteps(10)
    sample, output = torch.randn(2, 1, 4, 6, 6, generator=torch.Generator().manual_seed(0))
    for timestep in scheduler.timesteps[[0, 4, 9]]:
        expected = scheduler.step(output, timestep, sample).pred_original_sample
        found = CleanEstimate(scheduler)(sample, output, timestep.float().expand(1))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_the_clean_estimate_of_a_flow_undoes_its_noise() -> None:
    clean, noise = torch.randn(2, 3, 8, 5, generator=torch.Generator().manual_seed(0))
    sigma = torch.tensor([1.0, 0.5, 0.1])
    sample = (1 - sigma)[:, None, None] * clean + sigma[:, None, None] * noise
    found = CleanEstimate(None)(sample, noise - clean, 1000 * sigma)
    torch.testing.assert_close(found, clean)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_critic_on_the_estimate_sees_it_and_the_prompt_alone(family: str) -> None:
    backbone = tiny_backbone(family)
    critic = critic_of(backbone, trunk="clean_net", text_conditioning="tokens")
    assert_sees_the_estimate_and_the_prompt_alone(backbone, critic)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_gradient_of_a_critic_on_the_estimate_reaches_the_latent(family: str) -> None:
    backbone = tiny_backbone(family)
    critic = critic_of(backbone, trunk="clean_net")
    assert_its_gradient_reaches_the_latent(backbone, critic)


@pytest.mark.parametrize(("side", "tokens"), [(4, 16), (8, 64), (12, 36), (64, 64), (128, 64)])
def test_a_clean_net_halves_large_latents_until_their_sides_are_short(side: int, tokens: int) -> None:
    trunk = CleanNetTrunk(CleanEstimate(None), lambda latents: latents, (5, side, side))
    sample = torch.zeros(2, 5, side, side)
    (tap,) = trunk({"model_output": sample}, sample, torch.full((2,), 500.0), Conditioning({}))
    assert tap.shape == (2, tokens, CLEAN_CHANNELS)
    assert math.sqrt(tokens) <= MAP_SIDE


def test_a_clean_net_reads_packed_latents_as_the_map_that_is_decoded() -> None:
    """Tokens of one patch lie together on the map: a net that saw them as rows would mix other neighbours."""
    backbone = backbone_of(tiny_pipeline("flux"))
    length, dim = backbone.latent_shape
    rows, columns = backbone.grid
    latents = torch.arange(float(length * dim)).view(1, length, dim)
    (latent_map,) = backbone.latent_maps(latents)
    assert latent_map.shape == (dim // 4, 2 * rows, 2 * columns)
    # Token 1 is the second patch of the first row.
    assert torch.equal(latent_map[:, :2, 2:4].flatten(), latents[0, 1])


@pytest.mark.parametrize("text_conditioning", ["none", "pooled", "tokens"])
@pytest.mark.parametrize("family", PIPELINE_FAMILIES)
def test_the_head_reads_the_prompt_only_when_asked(family: str, text_conditioning: str) -> None:
    backbone = backbone_of(tiny_pipeline(family))
    critic = critic_of(backbone, trunk="shared", text_conditioning=text_conditioning)
    sample, timestep = state(backbone)
    one, other = (backbone.encode_prompts(PIPELINE_PROMPTS[start : start + 3]) for start in (0, 3))
    with torch.no_grad(), critic.record(backbone.model) as features:
        backbone.predict(sample, timestep, one)
    found = torch.equal(critic(features, sample, timestep, one), critic(features, sample, timestep, other))
    assert found == (text_conditioning == "none")


def test_a_family_without_a_pooled_embedding_lends_its_mean_token() -> None:
    backbone = tiny_backbone("unet")
    conditioning = backbone.encode_prompts(PROMPTS[:2])
    torch.testing.assert_close(
        pooled_prompt(conditioning), conditioning.tensors["encoder_hidden_states"].mean(dim=1)
    )


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("trunk", ["shared", "copy"])
def test_taps_lie_where_the_fractions_say(family: str, trunk: str) -> None:
    backbone = tiny_backbone(family)
    own = critic_of(backbone, trunk=trunk).trunk.tap_dims
    last = critic_of(backbone, trunk=trunk, taps=(1.0,))
    assert last.trunk.tap_dims == own[-1:]
    sample, timestep = state(backbone)
    assert values(backbone, last, sample, timestep, PROMPTS[:3]).shape == (3, 2)


@pytest.mark.parametrize(
    "settings",
    [
        {"trunk": "shared", "loss": "hl_gauss", "num_bins": 11},
        {"trunk": "clean_net", "text_conditioning": "pooled"},
        {"trunk": "copy", "taps": (0.5, 1.0), "text_conditioning": "tokens", "time_conditioning": False},
        {"trunk": "lora", "loss": "bce"},
        {"trunk": "branch", "value_clip": 0.2},
    ],
    ids=lambda settings: settings["trunk"],
)
def test_a_saved_critic_loads_as_it_was_configured(settings: dict[str, object], tmp_path: Path) -> None:
    backbone = tiny_backbone("dit")
    backbone.critic = critic_of(backbone, **settings)
    statistics = [torch.tensor([mean, 2 * mean]) for mean in (0.1, 0.4, 0.2, 0.3)]
    backbone.critic.rescale(*statistics)
    save_backbone(backbone, tmp_path / "saved")
    loaded = load_backbone(tmp_path / "saved")
    assert loaded.critic is not None
    assert loaded.critic.config == backbone.critic.config
    sample, timestep = state(backbone)
    found = values(loaded, loaded.critic, sample, timestep, PROMPTS[:3])
    assert torch.equal(found, values(backbone, backbone.critic, sample, timestep, PROMPTS[:3]))


def test_a_critic_saved_before_these_settings_existed_still_loads(tmp_path: Path) -> None:
    """Its description lay beside its weights and knew fewer settings; there was no manifest."""
    backbone = tiny_backbone("dit")
    backbone.critic = critic_of(backbone, trunk="shared")
    save_backbone(backbone, tmp_path / "saved")
    weights = tmp_path / "saved" / CRITIC_WEIGHTS
    save_file(load_file(weights), weights)
    (tmp_path / "saved" / MANIFEST).unlink()
    with pytest.raises(ValueError, match="holds no critic"):
        load_backbone(tmp_path / "saved")
    first = ("trunk", "num_blocks", "num_heads", "head_dim", "hidden_dim", "joint_weight", "lora_rank")
    config = asdict(backbone.critic.config)
    description = {"config": {name: config[name] for name in first}, "num_rewards": 2}
    (tmp_path / "saved" / EARLIER_DESCRIPTION).write_text(json.dumps(description), encoding="utf-8")
    loaded = load_backbone(tmp_path / "saved")
    assert loaded.critic is not None
    assert asdict(loaded.critic.config) == config
    sample, timestep = state(backbone)
    found = values(loaded, loaded.critic, sample, timestep, PROMPTS[:3])
    assert torch.equal(found, values(backbone, backbone.critic, sample, timestep, PROMPTS[:3]))


class _Mean(OwnForwardTrunk):
    """One token: the latent's mean."""

    tap_dims = (1,)

    def forward(
        self, features: Features, sample: Tensor, timestep: Tensor, conditioning: Conditioning
    ) -> list[Tensor]:
        return [sample.flatten(1).mean(dim=1)[:, None, None]]


def test_a_registered_trunk_is_built_saved_and_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lacfast.config.critic.REGISTERED_TRUNKS", registered := {})
    monkeypatch.setattr("lacfast.critic.trunk.REGISTERED_TRUNKS", registered)
    with pytest.raises(ValueError, match=r"unknown critic trunk 'mean'; known: branch, .*, none"):
        CriticConfig(trunk="mean")
    register_trunk("mean", lambda backbone, config: _Mean())
    backbone = tiny_backbone("dit")
    backbone.critic = critic_of(backbone, trunk="mean")
    save_backbone(backbone, tmp_path / "saved")
    loaded = load_backbone(tmp_path / "saved")
    assert loaded.critic is not None
    sample, timestep = state(backbone)
    found = values(loaded, loaded.critic, sample, timestep, PROMPTS[:3])
    assert torch.equal(found, values(backbone, backbone.critic, sample, timestep, PROMPTS[:3]))
    del registered["mean"]
    with pytest.raises(ValueError, match=r"module that registers it: bench\.learning\.controls"):
        load_backbone(tmp_path / "saved")


@pytest.mark.parametrize("name", ["branch", "none"])
def test_the_name_of_a_trunk_is_given_once(name: str) -> None:
    with pytest.raises(ValueError, match=f"'{name}' is taken"):
        register_trunk(name, lambda backbone, config: _Mean())


def test_every_critic_with_an_adapter_has_its_own_on_one_backbone() -> None:
    backbone = tiny_backbone("dit")
    sample, timestep = state(backbone)
    critics = []
    for seed in (1, 2):
        critic = critic_of(backbone, trunk="lora", lora_rank=2)
        with torch.no_grad():
            for weight in critic.trunk.weights:
                weight.normal_(std=0.3, generator=torch.Generator().manual_seed(seed))
        critics.append((critic, values(backbone, critic, sample, timestep, PROMPTS[:3])))
    for critic, alone in critics:
        assert torch.equal(values(backbone, critic, sample, timestep, PROMPTS[:3]), alone)
    assert not torch.allclose(critics[0][1], critics[1][1])


def test_the_adapter_of_a_critic_that_is_gone_makes_room_for_the_next() -> None:
    backbone = tiny_backbone("dit")
    kept = critic_of(backbone, trunk="lora", lora_rank=2)
    for _ in range(2):
        gone = critic_of(backbone, trunk="lora", lora_rank=2)
        del gone
    assert sorted(backbone.model.peft_config) == ["critic", "critic_2"]
    assert kept.trunk.adapter == "critic"
