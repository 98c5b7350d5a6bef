"""Costs are counted on a model without weights and are those of the real one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_pipelines import FAMILIES, tiny_pipeline

from lacfast.backbone import build_critic
from lacfast.backbones import PipelineSettings, load_backbone
from lacfast.backbones.blueprint import load_blueprint
from lacfast.config import KLPenalty, LoRAConfig, SamplerConfig, TrainConfig
from lacfast.runs.costs import Costs, count

LORA = LoRAConfig(rank=2)
SETTINGS = PipelineSettings(resolution=(16, 16))


def config_for(family: str, **changes: Any) -> TrainConfig:
    kind = "ddim" if family in ("sd15", "sdxl") else "flow_sde"
    sampler = SamplerConfig(kind=kind, num_steps=4, guidance_scale=1.0 if family == "flux" else 3.0)
    return replace(TrainConfig(batch_size=8, sampler=sampler), **changes)


def counted(directory: Path, config: TrainConfig) -> Costs:
    blueprint = load_blueprint(directory, lora=LORA, settings=SETTINGS)
    backbone = blueprint.backbone
    critic = build_critic(backbone, 1, config.critic)
    table = backbone.transition_table(config.sampler)
    return count(backbone, critic, table, blueprint.conditioning(), config)


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    directory = tmp_path_factory.mktemp(request.param)
    tiny_pipeline(request.param).save_pretrained(directory)
    return request.param, directory


def test_a_blueprint_costs_what_the_real_model_costs(family: tuple[str, Path]) -> None:
    name, directory = family
    config = config_for(name)
    real = load_backbone(directory, lora=LORA, settings=SETTINGS)
    critic = build_critic(real, 1, config.critic)
    table = real.transition_table(config.sampler)
    on_cpu = count(real, critic, table, real.encode_unconditional(1), config)
    on_meta = counted(directory, config)
    # Layer norms and the like are single kernels on a CPU, which keep other tensors.
    assert replace(on_meta, activation_bytes=0) == replace(on_cpu, activation_bytes=0)
    assert on_meta.activation_bytes == pytest.approx(on_cpu.activation_bytes, rel=0.25)


def test_checkpointing_trades_activations_for_flops(family: tuple[str, Path]) -> None:
    name, directory = family
    plain = counted(directory, config_for(name))
    frugal = counted(directory, config_for(name, gradient_checkpointing=True))
    assert frugal.activation_bytes < 0.7 * plain.activation_bytes
    assert frugal.update_flops > plain.update_flops
    assert frugal.sampling_flops == plain.sampling_flops


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


def test_the_total_is_all_that_lives_at_the_same_time(tmp_path: Path) -> None:
    tiny_pipeline("sd3").save_pretrained(tmp_path)
    config = config_for("sd3")
    config = replace(config, ppo=replace(config.ppo, kl=KLPenalty(weight=0.01)))
    blueprint = load_blueprint(tmp_path, settings=SETTINGS)
    table = blueprint.backbone.transition_table(config.sampler)
    arguments = (blueprint.backbone, None, table, blueprint.conditioning(), config)
    costs = count(*arguments, beside_bytes=blueprint.decoder_bytes + blueprint.text_encoder_bytes)
    # Without LoRA the anchor is a copy of the model, and 4 + 8 bytes follow every weight.
    assert costs.weight_bytes == 2 * 4 * costs.parameters
    assert costs.memory_bytes(3) == (
        (8 + 12) * costs.parameters
        + costs.beside_bytes
        + costs.rollout_bytes
        + 3 * costs.activation_bytes
        + (4 * costs.parameters if config.ema_decay else 0)
    )
    assert costs.beside_bytes > 0
