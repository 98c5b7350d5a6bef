"""Costs are counted on a model without weights and are those of the real one."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_pipelines import DDIM_FAMILIES, FAMILIES, FRAMES, tiny_pipeline

from lacfast.backbone import build_critic
from lacfast.backbones import PipelineSettings, load_backbone
from lacfast.backbones.blueprint import load_blueprint
from lacfast.backbones.latent import LatentBackbone
from lacfast.config import LoRAConfig, SamplerConfig, TrainConfig
from lacfast.records import Conditioning
from lacfast.runs.costs import Costs, LiveBytes, count, fused_attention

LORA = LoRAConfig(rank=2)
SETTINGS = PipelineSettings(resolution=(16, 16))


def settings_for(directory: Path) -> PipelineSettings:
    """Of the pipeline in a directory."""
    is_video = "WanPipeline" in (directory / "model_index.json").read_text(encoding="utf-8")
    return replace(SETTINGS, num_frames=FRAMES) if is_video else SETTINGS


def config_for(family: str, **changes: Any) -> TrainConfig:
    kind = "ddim" if family in DDIM_FAMILIES else "flow_sde"
    sampler = SamplerConfig(kind=kind, num_steps=4, guidance_scale=1.0 if family == "flux" else 3.0)
    return replace(TrainConfig(batch_size=8, sampler=sampler), **changes)


@cache
def counted(directory: Path, config: TrainConfig) -> Costs:
    blueprint = load_blueprint(directory, lora=LORA, settings=settings_for(directory))
    backbone = blueprint.backbone
    critic = build_critic(backbone, 1, config.critic)
    table = backbone.transition_table(config.sampler)
    return count(backbone, critic, table, blueprint.conditioning(), config)


def update_bytes(backbone: LatentBackbone, prompt: Conditioning, *, pairs: int = 4) -> int:
    """Bytes of forward and backward of some pairs, as the plan of an update follows them."""
    sample, timestep = torch.zeros(pairs, *backbone.latent_shape, device="meta"), torch.zeros(pairs)
    prompts = {name: each.new_empty(pairs, *each.shape[1:]) for name, each in prompt.tensors.items()}
    live = LiveBytes()
    with fused_attention(), live:
        backbone.predict(sample, timestep.to("meta"), Conditioning(prompts)).sum().backward()
    for parameter in backbone.policy_parameters():
        parameter.grad = None
    return live.peak["meta"]


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    directory = tmp_path_factory.mktemp(request.param)
    tiny_pipeline(request.param).save_pretrained(directory)
    return request.param, directory


def test_a_blueprint_costs_what_the_real_model_costs(family: tuple[str, Path]) -> None:
    name, directory = family
    config = config_for(name)
    real = load_backbone(directory, lora=LORA, settings=settings_for(directory))
    critic = build_critic(real, 1, config.critic)
    table = real.transition_table(config.sampler)
    on_cpu = count(real, critic, table, real.encode_unconditional(1), config)
    on_meta = counted(directory, config)
    assert on_meta == on_cpu


def test_checkpointing_trades_activations_for_flops(family: tuple[str, Path]) -> None:
    name, directory = family
    plain, config = counted(directory, config_for(name)), config_for(name, gradient_checkpointing=True)
    blueprint = load_blueprint(directory, lora=LORA, settings=settings_for(directory))
    backbone, prompt = blueprint.backbone, blueprint.conditioning()
    large = update_bytes(backbone, prompt)
    table, critic = backbone.transition_table(config.sampler), build_critic(backbone, 1, config.critic)
    frugal = count(backbone, critic, table, prompt, config)
    assert frugal.update_flops > plain.update_flops
    assert frugal.sampling_flops == plain.sampling_flops
    # A model of two blocks still holds all of the one that is computed again.
    assert update_bytes(backbone, prompt) < (0.9 if name in ("sd3", "wan") else 0.7) * large


def test_guidance_doubles_the_forwards_and_detaching_half_saves_a_fifth_of_the_update(tmp_path: Path) -> None:
    tiny_pipeline("sd3").save_pretrained(tmp_path)
    config = config_for("sd3")
    guided = counted(tmp_path, config)
    free = counted(tmp_path, replace(config, sampler=replace(config.sampler, guidance_scale=1.0)))
    both = counted(tmp_path, replace(config, ppo=replace(config.ppo, cfg_grad="both")))
    assert guided.sampling_forwards == 2 * free.sampling_forwards == 2 * 8 * 4
    assert guided.update_pairs == 8 * 3
    assert both.update_flops > 1.2 * guided.update_flops


def test_all_weights_in_half_precision_are_counted_with_checkpointing(tmp_path: Path) -> None:
    tiny_pipeline("flux").save_pretrained(tmp_path)
    blueprint = load_blueprint(tmp_path, dtype=torch.bfloat16, settings=SETTINGS)
    config = config_for("flux", gradient_checkpointing=True)
    table = blueprint.backbone.transition_table(config.sampler)
    costs = count(blueprint.backbone, None, table, blueprint.conditioning(), config)
    assert costs.trained_parameters == costs.parameters
    assert costs.update_backward_flops > 1.5 * costs.update_forward_flops
