"""Methods as configurations of one trainer, alike in everything that the method leaves open."""

from __future__ import annotations

from dataclasses import replace

from lacfast import presets
from lacfast.config import AdvantageConfig, TrainConfig

GROUP_SIZE = 8
"""Images per prompt of group-relative methods; the rollout's size stays, so it has fewer prompts."""


def latent_critic(backbone: str) -> TrainConfig:
    """The method: a branch critic, one sample per prompt, value pretraining."""
    return presets.shapes(backbone)


def copied_trunk(backbone: str) -> TrainConfig:
    """The critic with a trunk of its own, initialised from the actor."""
    config = latent_critic(backbone)
    return replace(config, critic=replace(config.critic, trunk="copy"))


def shuffled_critic(backbone: str) -> TrainConfig:
    """A control: the baseline is the value of another trajectory at the same step."""
    return replace(latent_critic(backbone), advantages=AdvantageConfig(estimator="shuffled_critic"))


def scalarized(backbone: str) -> TrainConfig:
    """One head on the weighted sum of the rewards."""
    return replace(latent_critic(backbone), advantages=AdvantageConfig(combination="scalarized"))


def group_relative(backbone: str, estimator: str) -> TrainConfig:
    """Estimators that compare the images of one prompt: "grpo" or "leave_one_out"."""
    return replace(
        latent_critic(backbone),
        advantages=AdvantageConfig(estimator=estimator),
        samples_per_prompt=GROUP_SIZE,
    )


def running_prompt_statistics(backbone: str) -> TrainConfig:
    """DDPO: every reward against the last ones of its prompt."""
    return replace(latent_critic(backbone), advantages=AdvantageConfig(estimator="ddpo"))
