"""The benchmark's arms differ in what they claim to differ in, and in nothing else."""

from __future__ import annotations

from dataclasses import replace

import pytest

from bench.learning import arms
from bench.learning.study_config import study_config
from lacfast.backbones import adapt_pretrained
from lacfast.config import (
    DDPO,
    GRPO,
    AdvantageConfig,
    CriticConfig,
    KLMask,
    KLPenalty,
    TrainConfig,
    variant,
)
from lacfast.runs.recipes import recipe
from lacfast.schedule import flow_sde, uniform_sigmas
from lacfast.tasks.models import BackboneName
from lacfast.tasks.pretraining import pretrain

BACKBONES: tuple[BackboneName, ...] = ("dit", "unet")


def without_critic(backbone: BackboneName) -> dict[str, TrainConfig]:
    return {
        "grpo": arms.group_relative(backbone, GRPO()),
        "leave_one_out": arms.leave_one_out(backbone),
        "group_std": arms.group_std(backbone),
        "ddpo": arms.running_prompt_statistics(backbone),
        "batch_mean": arms.batch_mean(backbone),
    }


@pytest.mark.parametrize("backbone", BACKBONES)
def test_arms_without_a_critic_differ_from_the_critic_s_in_the_advantages_alone(
    backbone: BackboneName,
) -> None:
    critic = arms.latent_critic(backbone)
    for name, arm in without_critic(backbone).items():
        assert arm.critic == CriticConfig(trunk="none"), name
        # What a critic alone reads is not set without one.
        read = {"gae_lambda": critic.ppo.gae_lambda, "trunk_learning_rate": critic.ppo.trunk_learning_rate}
        same = replace(
            arm,
            advantages=AdvantageConfig(),
            critic=critic.critic,
            samples_per_prompt=1,
            ppo=replace(arm.ppo, **read),
            pretrain=critic.pretrain,
        )
        assert same == critic, name


@pytest.mark.parametrize("backbone", BACKBONES)
def test_losses_on_the_forward_process_have_the_others_advantages_and_as_many_pairs(
    backbone: BackboneName,
) -> None:
    grpo, critic = arms.group_relative(backbone, GRPO()), arms.latent_critic(backbone)
    made = {
        "nft": (arms.diffusion_nft(backbone), grpo),
        "awm": (arms.advantage_weighted_matching(backbone), grpo),
        "critic": (arms.critic_weighted(backbone), critic),
    }
    for name, (arm, origin) in made.items():
        assert arm == variant(origin, objective=arm.objective, ppo=arm.ppo), name
        pairs = arm.ppo.timestep_fraction * len(arm.objective.forward_steps(8) or ())
        assert pairs == pytest.approx(origin.ppo.timestep_fraction * 5), name
        assert arm.ppo.num_minibatches == origin.ppo.num_minibatches, name
        assert arm.ppo.advantage_clip == 5, name


def test_the_trust_regions_are_grpo_s_but_for_the_bound() -> None:
    grpo, mask, norm = arms.group_relative("dit", GRPO()), arms.kl_mask("dit"), arms.ratio_norm("dit")
    # 16 channels of 8 x 8, clip 1e-3.
    assert isinstance(mask.ppo.clip, KLMask)
    assert mask.ppo.clip.kl_threshold == pytest.approx(1024 * 1e-6 / 2)
    assert norm.ppo.ratio == "ratio_norm"
    for arm in (mask, norm):
        assert replace(arm, ppo=grpo.ppo) == grpo


def test_the_clip_of_ratio_norm_is_in_the_sampler_s_own_std() -> None:
    sampler = study_config("dit").sampler
    table = flow_sde(uniform_sigmas(sampler.num_steps), sampler.noise_level, window=sampler.stochastic_window)
    mean = table.std[table.trainable_steps].mean()
    assert float(mean) == pytest.approx(arms.MEAN_STD, abs=0.005)


def test_the_kl_mask_counts_the_elements_of_the_tiny_models() -> None:
    backbone = adapt_pretrained(pretrain("dit", seed=0, steps=1))
    channels, height, width = backbone.latent_shape
    assert channels * height * width == 1024


def test_the_rules_for_two_rewards_differ_in_the_rule_alone() -> None:
    rules = {
        "scalarized": arms.scalarized("dit"),
        "conditional": arms.conditional("dit", "shapes_height", "shapes", 0.5),
        "constrained": arms.constrained("dit", "shapes", 0.6),
    }
    for name, config in rules.items():
        assert config.advantages.combination == name
        assert replace(config, advantages=AdvantageConfig()) == arms.with_trunk("dit", "branch")


def test_published_baselines_are_recipes() -> None:
    names = ("flow-grpo-geneval", "dance-grpo-hpsv2", "ddpo-compressibility")
    flow, dance, ddpo = (recipe(name).train for name in names)
    assert (flow.batch_size, flow.samples_per_prompt, flow.ppo.kl) == (1152, 24, KLPenalty(0.04, "flow_grpo"))
    assert (dance.batch_size, dance.samples_per_prompt, dance.advantages.estimator) == (
        192,
        12,
        GRPO(std="group"),
    )
    assert (ddpo.batch_size, ddpo.advantages.estimator) == (256, DDPO())
    assert ddpo.sampler.stochastic_window == (0, 50)
    assert {flow.critic.trunk, dance.critic.trunk, ddpo.critic.trunk} == {"none"}


@pytest.mark.parametrize("backbone", BACKBONES)
def test_noise_levels_are_chosen_without_more_pairs(backbone: BackboneName) -> None:
    whole = arms.critic_weighted(backbone)
    steps = whole.sampler.num_steps
    pairs = whole.ppo.timestep_fraction * steps
    for chosen, expected in (((1, steps), pairs), ((1, 4), 3)):
        arm = arms.at_levels(whole, chosen)
        trained = arm.objective.forward_steps(steps)
        assert trained == tuple(range(*chosen))
        assert arm.ppo.timestep_fraction * len(trained) == pytest.approx(expected)
        objective, ppo = replace(arm.objective, steps=None), replace(arm.ppo, timestep_fraction=0.5)
        assert variant(arm, objective=objective, ppo=ppo) == whole
