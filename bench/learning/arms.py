"""Methods as configurations of one trainer, alike in everything that the method leaves open."""

from __future__ import annotations

from dataclasses import replace

from bench.learning.controls import ShuffledCritic
from bench.learning.study_config import study_config
from lacfast.config import (
    AWM,
    DDPO,
    GRPO,
    NFT,
    AdvantageConfig,
    BatchMean,
    CriticConfig,
    ForwardProcess,
    GroupBaseline,
    KLMask,
    LeaveOneOut,
    Ratio,
    TrainConfig,
    variant,
)
from lacfast.tasks.codec import CHANNELS
from lacfast.tasks.models import LATENT_SIZE

GROUP_SIZE = 8
"""Images per prompt of group-relative methods; the rollout's size stays, so it has fewer prompts."""
PRETRAINING_ITERATIONS = 4
"""Rollouts of value pretraining, where there is any; a short run does not earn back the preset's 16."""
TAUGHT_ITERATIONS = 80
"""The same of a critic whose value pretraining costs nothing."""
SLOW_ROLLOUTS = 64
"""Rollouts that the slow critic draws from."""
SLOW_RATE = 3e-4
"""Its head's rate; the others have 1e-3."""
REPLAYED_ROLLOUTS, REPLAYED_MINIBATCHES = 8, 16
"""Rollouts that a critic with a replay draws from, and its optimizer steps per pass."""
SMALL_ROLLOUTS = {"dit": 48, "unet": 16}
"""Backbone -> images of a rollout for DiffusionNFT: tuning chose them for groups, on the DiT for the critic
too."""
UNET_RATE = 7.5e-5
"""Policy learning rate that tuning chose for the latent critic on the UNet; losses on the forward process are
tuned around it."""
FORWARD_CLIP = 5.0
"""Bound of the advantages that DiffusionNFT and AWM weigh by: their authors'."""
AWM_STEPS = (1, 7)
"""Steps of the sampler's 8 that AWM trains."""
AWM_OLD_WEIGHT = 0.01
"""Weight of its distance from the old policy: at 1, its authors', steps behind a rollout's first undo it."""
MEAN_STD = 0.47
"""Mean deviation of the trained steps of the tiny models' sampler."""


def latent_critic(backbone: str, trunk: str | None = None) -> TrainConfig:
    """The method as the preset has it, one sample per prompt; whether values are pretrained is the Arm's."""
    return pretrained_for(study_config(backbone, trunk), PRETRAINING_ITERATIONS)


def pretrained_for(config: TrainConfig, iterations: int) -> TrainConfig:
    """The configuration with so many rollouts of value pretraining, and no other images for it."""
    pretrain = replace(config.pretrain, iterations=iterations, patience=iterations, held_out_samples=0)
    return replace(config, pretrain=pretrain)


def taught_critic(backbone: str) -> TrainConfig:
    """A control: a critic that has seen the base model often; see Arm.counts_pretraining."""
    return pretrained_for(latent_critic(backbone), TAUGHT_ITERATIONS)


def with_trunk(backbone: str, trunk: str) -> TrainConfig:
    """The critic on other features: "branch" copies blocks, "copy" all of them, "shared" is a head alone."""
    return latent_critic(backbone, trunk)


def distributional(config: TrainConfig) -> TrainConfig:
    """Values as the mean of a softmax over bins, see docs/critic.md."""
    return replace(config, critic=replace(config.critic, loss="hl_gauss"))


def replayed(config: TrainConfig) -> TrainConfig:
    """The critic's passes draw from the last rollouts, in smaller minibatches."""
    ppo = replace(config.ppo, critic_rollouts=REPLAYED_ROLLOUTS, critic_minibatches=REPLAYED_MINIBATCHES)
    return replace(config, ppo=ppo)


def slowed(config: TrainConfig) -> TrainConfig:
    """The configuration whose critic takes shorter steps, on the states of many more rollouts."""
    ppo = replace(config.ppo, critic_rollouts=SLOW_ROLLOUTS, value_learning_rate=SLOW_RATE)
    return replace(config, ppo=ppo)


def shuffled_critic(backbone: str) -> TrainConfig:
    """A control: the baseline is the value of another trajectory at the same step."""
    return replace(latent_critic(backbone), advantages=AdvantageConfig(estimator=ShuffledCritic()))


def at_rate(config: TrainConfig, rate: float) -> TrainConfig:
    """The configuration with another learning rate of the policy."""
    return replace(config, ppo=replace(config.ppo, policy_learning_rate=rate))


def without_critic(backbone: str) -> TrainConfig:
    """All but the method: what the baselines start from."""
    return variant(
        latent_critic(backbone),
        critic=CriticConfig(trunk="none"),
        advantages=AdvantageConfig(estimator=BatchMean()),
    )


def scalarized(backbone: str) -> TrainConfig:
    """One head on the weighted sum of the rewards."""
    return replace(with_trunk(backbone, "branch"), advantages=AdvantageConfig(combination="scalarized"))


def constrained(backbone: str, reward: str, floor: float) -> TrainConfig:
    """A head per reward; the weight of `reward` rises while its raw mean lies below `floor`."""
    rule = AdvantageConfig(combination="constrained", floors=((reward, floor),))
    return replace(with_trunk(backbone, "branch"), advantages=rule)


def conditional(backbone: str, easy: str, hard: str, threshold: float) -> TrainConfig:
    """A head per reward; `easy` counts only for images whose raw `hard` reaches `threshold`."""
    rule = AdvantageConfig(combination="conditional", conditions=((easy, hard, threshold),))
    return replace(with_trunk(backbone, "branch"), advantages=rule)


def group_relative(backbone: str, estimator: GroupBaseline) -> TrainConfig:
    """Estimators that compare the images of one prompt."""
    advantages = AdvantageConfig(estimator=estimator)
    return replace(without_critic(backbone), advantages=advantages, samples_per_prompt=GROUP_SIZE)


def leave_one_out(backbone: str) -> TrainConfig:
    """RLOO as published, which divides by nothing; divided, it would be GRPO times a constant."""
    return group_relative(backbone, LeaveOneOut(std="none"))


def running_prompt_statistics(backbone: str) -> TrainConfig:
    """DDPO: every reward against the last ones of its prompt."""
    return replace(without_critic(backbone), advantages=AdvantageConfig(estimator=DDPO()))


def batch_mean(backbone: str) -> TrainConfig:
    """REINFORCE: every reward against the rollout."""
    return without_critic(backbone)


def group_std(backbone: str) -> TrainConfig:
    """GRPO with the group's own deviation, as DanceGRPO has it."""
    return group_relative(backbone, GRPO(std="group"))


def kl_mask(backbone: str) -> TrainConfig:
    """Flow-DPPO: GRPO with a KL mask for the clip.

    The threshold is the KL at which a move along one's own noise reaches the other arms' clip, N clip^2 / 2.
    """
    config = group_relative(backbone, GRPO())
    threshold = CHANNELS * LATENT_SIZE**2 * _clip(config) ** 2 / 2
    return replace(config, ppo=replace(config.ppo, clip=KLMask(threshold)))


def ratio_norm(backbone: str) -> TrainConfig:
    """GRPO-Guard: GRPO with its ratio, which lacks a factor 1 / std and weighs the steps alike by itself."""
    config = group_relative(backbone, GRPO())
    clip = MEAN_STD * _clip(config)
    return replace(config, ppo=replace(config.ppo, ratio="ratio_norm", clip=Ratio(clip), balance_steps=False))


def forward_process(backbone: str, config: TrainConfig, objective: ForwardProcess) -> TrainConfig:
    """The configuration with a loss on the forward process, on as many pairs as PPO trains.

    It samples and is judged with the sampler of the other arms.
    """
    start, stop = config.sampler.stochastic_window
    trained = len(objective.forward_steps(config.sampler.num_steps))
    fraction = config.ppo.timestep_fraction * (stop - start) / trained
    ppo = replace(config.ppo, timestep_fraction=fraction, advantage_clip=FORWARD_CLIP)
    if backbone == "unet":
        ppo = replace(ppo, policy_learning_rate=UNET_RATE)
    return variant(config, objective=objective, ppo=ppo)


def diffusion_nft(backbone: str) -> TrainConfig:
    """DiffusionNFT on GRPO's advantages, as its authors have it."""
    return forward_process(backbone, group_relative(backbone, GRPO()), NFT())


def advantage_weighted_matching(backbone: str) -> TrainConfig:
    """AWM on GRPO's advantages; like its authors it leaves out the first step and the last tenth.

    They take one optimizer step per rollout, at which the distance from the old policy is 0.
    """
    objective = AWM(steps=AWM_STEPS, old_weight=AWM_OLD_WEIGHT)
    return forward_process(backbone, group_relative(backbone, GRPO()), objective)


def critic_weighted(backbone: str) -> TrainConfig:
    """DiffusionNFT whose weights are the critic's advantages at the noised states, one image per prompt."""
    return forward_process(backbone, latent_critic(backbone), NFT())


def batch_mean_weighted(backbone: str) -> TrainConfig:
    """A control: DiffusionNFT on one image per prompt, each reward against the rollout's mean."""
    return forward_process(backbone, batch_mean(backbone), NFT())


def history_weighted(backbone: str) -> TrainConfig:
    """A control: the same, each reward against the last ones of its prompt, as DDPO has it."""
    return forward_process(backbone, running_prompt_statistics(backbone), NFT())


def at_levels(config: TrainConfig, steps: tuple[int, int]) -> TrainConfig:
    """The configuration whose loss on the forward process trains these steps alone, on no more pairs."""
    objective = config.objective
    assert isinstance(objective, ForwardProcess)
    pairs = config.ppo.timestep_fraction * len(objective.forward_steps(config.sampler.num_steps))
    ppo = replace(config.ppo, timestep_fraction=min(pairs / (steps[1] - steps[0]), 1.0))
    return variant(config, objective=replace(objective, steps=steps), ppo=ppo)


def _clip(config: TrainConfig) -> float:
    clip = config.ppo.clip
    assert isinstance(clip, Ratio)
    assert isinstance(clip.clip_range, float), "the preset has one clip for both sides"
    return clip.clip_range
