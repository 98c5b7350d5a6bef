"""A recipe that follows a script names its revision and has its noise levels and settings."""

from __future__ import annotations

import re
from functools import cache, partial

import numpy as np
import pytest
import torch
from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu
from torch import Tensor

from lacfast.backbones.blueprint import load_blueprint
from lacfast.config import AWM, DDPO, GRPO, NFT, Fixed, KLPenalty, LoRAConfig, Random, Ratio
from lacfast.records import TransitionTable
from lacfast.rewards.frames import judged_places
from lacfast.runs.devices import torch_dtype
from lacfast.runs.recipes import directory, recipe

SCRIPTS = {
    "flow-grpo-geneval": "yifan123/flow_grpo",
    "dance-grpo-hpsv2": "XueZeyue/DanceGRPO",
    "ddpo-compressibility": "kvablack/ddpo-pytorch",
    "flow-grpo-qwen-image": "yifan123/flow_grpo",
    "flow-factory-z-image": "X-GenGroup/Flow-Factory",
    "flow-factory-klein": "X-GenGroup/Flow-Factory",
    "flow-grpo-wan-ocr": "yifan123/flow_grpo",
    "diffusion-nft-geneval": "NVlabs/DiffusionNFT",
    "awm-geneval": "scxue/advantage_weighted_matching",
}
"""Recipes that do what somebody's script does."""


@cache
def table_of(name: str) -> TransitionTable:
    """Through the published model's own scheduler; an adapter has no say in it."""
    config = recipe(name)
    blueprint = load_blueprint(config.model, dtype=torch_dtype(config.dtype), settings=config.pipeline)
    return blueprint.backbone.transition_table(config.train.sampler)


def flow_grpo_levels(count: int = 10) -> np.ndarray:
    """SD3.5's scheduler shifts 1000 uniform levels by 3, takes `count` between the ends, shifts again."""
    ends = 3 * np.array([1.0, 0.001]) / (1 + 2 * np.array([1.0, 0.001]))
    levels = np.linspace(*ends, count)
    return np.append(3 * levels / (1 + 2 * levels), 0.0)


def dance_grpo_levels() -> np.ndarray:
    """17 uniform levels, shifted by 3; FLUX's own shift at 720 pixels is not asked."""
    levels = np.linspace(1, 0, 17)
    return 3 * levels / (1 + 2 * levels)


def ddpo_levels() -> np.ndarray:
    """DDIM's 50 leading timesteps of SD 1.4, offset by one; the last alpha is that of timestep 0."""
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    timesteps = np.append(np.arange(981, 0, -20), 0)
    return np.sqrt(1 - np.cumprod(1 - betas)[timesteps])


def shifted(levels: np.ndarray, factor: float) -> np.ndarray:
    return np.append(factor * levels / (1 + (factor - 1) * levels), 0.0)


def qwen_image_levels() -> np.ndarray:
    """Ten levels from 1 to 0.1, shifted by exp(mu) of 1024 tokens, and stretched to end at 0.02."""
    mu = 0.5 + (0.9 - 0.5) * (1024 - 256) / (8192 - 256)
    levels = shifted(np.linspace(1, 0.1, 10), np.exp(mu))[:-1]
    return np.append(1 - (1 - levels) * (1 - 0.02) / (1 - levels[-1]), 0.0)


def z_image_levels() -> np.ndarray:
    """Ten levels from 1 to 0.1, shifted by the scheduler's 6."""
    return shifted(np.linspace(1, 0.1, 10), 6.0)


def klein_levels() -> np.ndarray:
    """Eight levels from 1 to 1 / 8, shifted by FLUX.2's own mu of 576 tokens and 8 steps."""
    return shifted(np.linspace(1, 1 / 8, 8), np.exp(compute_empirical_mu(576, 8)))


def wan_levels() -> np.ndarray:
    """UniPC's: uniform from 1 to the last training step, which is left out, shifted by 3."""
    levels = np.linspace(1, 0.001, 21)[:-1]
    return np.append(3 * levels / (1 + 2 * levels), 0.0)


LEVELS = {
    "flow-grpo-geneval": flow_grpo_levels,
    "dance-grpo-hpsv2": dance_grpo_levels,
    "ddpo-compressibility": ddpo_levels,
    "flow-grpo-qwen-image": qwen_image_levels,
    "flow-factory-z-image": z_image_levels,
    "flow-factory-klein": klein_levels,
    "flow-grpo-wan-ocr": wan_levels,
    "diffusion-nft-geneval": flow_grpo_levels,
    "awm-geneval": partial(flow_grpo_levels, 14),
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_recipe_has_the_noise_levels_of_its_script_and_names_the_revision(name: str) -> None:
    found: Tensor = table_of(name).sigmas
    torch.testing.assert_close(found.numpy(), LEVELS[name](), rtol=2e-5, atol=2e-6)
    text = (directory() / f"{name}.yaml").read_text(encoding="utf-8")
    assert re.search(rf"^# Revision: {SCRIPTS[name]} at [0-9a-f]{{12}}\.", text, re.MULTILINE)


def test_dance_grpo_has_the_settings_of_its_script() -> None:
    config = recipe("dance-grpo-hpsv2")
    sampler, ppo = config.train.sampler, config.train.ppo
    assert (sampler.num_steps, sampler.noise_level, sampler.shift) == (16, 0.3, 3.0)
    assert (config.train.batch_size, config.train.samples_per_prompt) == (16 * 12, 12)
    assert (ppo.clip, ppo.advantage_clip, ppo.policy_learning_rate) == (Ratio(1e-4), 5.0, 1e-5)
    # Four gradients are added up for a step of a prompt's twelve trajectories.
    assert ppo.num_minibatches == 12 // 4
    # 0.6 of the fifteen steps before the last.
    assert len(table_of("dance-grpo-hpsv2").trainable_steps) * ppo.timestep_fraction == 9
    assert config.pipeline.resolution == (720, 720)


def test_ddpo_has_the_settings_of_its_script() -> None:
    config = recipe("ddpo-compressibility")
    sampler, ppo = config.train.sampler, config.train.ppo
    assert config.lora == LoRAConfig(rank=4)
    assert (sampler.num_steps, sampler.noise_level, sampler.guidance_scale) == (50, 1.0, 5.0)
    assert sampler.window == Fixed((0, 50))
    assert (ppo.clip, ppo.advantage_clip, ppo.policy_learning_rate) == (Ratio(1e-4), 5.0, 3e-4)
    # 8 GPUs of 8 images in 4 batches; 32 images per GPU by 4 in 2 accumulated gradients.
    assert (config.train.batch_size, ppo.num_minibatches) == (8 * 8 * 4, 32 // (4 * 2))
    assert config.train.advantages.estimator == DDPO(buffer_size=16, min_count=16)


def test_flow_grpo_has_the_settings_of_its_script() -> None:
    config = recipe("flow-grpo-geneval")
    sampler, ppo = config.train.sampler, config.train.ppo
    assert config.lora == LoRAConfig(rank=32, alpha=64)
    assert (sampler.num_steps, sampler.noise_level, sampler.guidance_scale) == (10, 0.7, 4.5)
    assert (config.train.batch_size, config.train.samples_per_prompt) == (48 * 24, 24)
    assert (ppo.clip, ppo.advantage_clip, ppo.policy_learning_rate) == (Ratio(1e-4), 5.0, 3e-4)
    assert ppo.kl is not None
    assert (ppo.kl.weight, ppo.kl.kind) == (0.04, "flow_grpo")
    assert config.train.advantages.estimator == GRPO(std="global")
    # int(0.99 10) steps are trained.
    assert len(table_of("flow-grpo-geneval").trainable_steps) == 9


@pytest.mark.parametrize(
    ("name", "groups", "window"),
    [
        ("flow-grpo-qwen-image", 32, Random(size=2, within=(0, 5))),
        ("flow-factory-z-image", 48, Random(size=1, within=(1, 4))),
        ("flow-factory-klein", 48, Random(size=1, within=(1, 4))),
    ],
)
def test_recipes_of_2026_s_models_have_the_settings_of_their_scripts(
    name: str, groups: int, window: Random
) -> None:
    config = recipe(name)
    sampler, ppo = config.train.sampler, config.train.ppo
    assert config.lora == LoRAConfig(rank=64, alpha=128)
    assert (config.train.batch_size, config.train.samples_per_prompt) == (groups * 16, 16)
    assert sampler.window == window
    assert (ppo.clip, ppo.advantage_clip, ppo.policy_learning_rate) == (Ratio(1e-4), 5.0, 3e-4)
    assert (ppo.num_minibatches, ppo.betas, ppo.adam_eps, ppo.kl) == (2, (0.9, 0.999), 1e-8, None)


def test_flow_grpo_s_wan_has_the_settings_of_its_script() -> None:
    config = recipe("flow-grpo-wan-ocr")
    sampler, ppo, pipeline = config.train.sampler, config.train.ppo, config.pipeline
    assert (pipeline.resolution, pipeline.num_frames) == ((240, 416), 33)
    assert judged_places(33, pipeline.judged_frames or 0) == [*range(0, 33, 4)]
    assert (sampler.num_steps, sampler.guidance_scale) == (20, 4.5)
    # Two batches of eight by groups of four, and an optimizer step for each batch.
    assert (config.train.batch_size, config.train.samples_per_prompt, ppo.num_minibatches) == (2 * 8, 4, 2)
    assert (ppo.clip, ppo.advantage_clip, ppo.policy_learning_rate) == (Ratio(1e-3), 5.0, 1e-4)
    assert ppo.kl is not None
    assert (ppo.kl.weight, ppo.kl.kind) == (0.004, "flow_grpo")
    assert config.train.advantages.estimator == GRPO(std="group")
    # int(0.99 20) steps are trained.
    assert len(table_of("flow-grpo-wan-ocr").trainable_steps) == 19


@pytest.mark.parametrize(
    ("name", "images", "objective", "share", "kl"),
    [
        ("diffusion-nft-geneval", 48 * 24, NFT(1.0, old_decay=0.5, old_decay_rate=1e-3), 9 / 10, 1e-4),
        ("awm-geneval", 8 * 6 * 36, AWM(steps=(1, 12), power=0.25, old_decay=0.3), 6 / 11, 1e-3),
    ],
)
def test_losses_on_the_forward_process_have_the_settings_of_their_scripts(
    name: str, images: int, objective: NFT | AWM, share: float, kl: float
) -> None:
    train = recipe(name).train
    ppo = train.ppo
    assert (train.objective, train.batch_size, train.samples_per_prompt) == (objective, images, 24)
    assert train.advantages.estimator == GRPO(std="global")
    assert (ppo.advantage_clip, ppo.kl, ppo.max_grad_norm) == (5.0, KLPenalty(kl, "velocity"), 1.0)
    assert (ppo.policy_learning_rate, ppo.betas, ppo.weight_decay) == (3e-4, (0.9, 0.999), 1e-4)
    # One optimizer step per rollout, on as many noise levels of every image.
    assert (ppo.num_minibatches, ppo.minibatch_draw) == (1, "stratified")
    assert ppo.timestep_fraction == pytest.approx(share)
    assert train.sampler.guidance_scale == 1
    assert recipe(name).lora == LoRAConfig(rank=32, alpha=64)
