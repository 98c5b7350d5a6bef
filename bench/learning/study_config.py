"""What studies start from: the recipes of PPO on the embedded task, without an end."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

from lacfast.config import PPOConfig, TrainConfig
from lacfast.config.critic import WEIGHTLESS_TRUNKS
from lacfast.runs.recipes import recipe

RECIPES = {"dit": "shapes-ppo", "unet": "shapes-unet-ppo"}
"""Backbone -> its recipe."""


def study_config(backbone: str, trunk: str | None = None) -> TrainConfig:
    """Latent actor-critic PPO on a CPU as studies compare methods with it: without evaluations, with a rate
    that stays, and without a hold of the untrained steps.

    Args:
        backbone: "dit" or "unet".
        trunk: of the critic. None: the one that fits the backbone.
    """
    if backbone not in RECIPES:
        raise ValueError(f"unknown backbone {backbone!r}; known: {', '.join(RECIPES)}")
    train = _preset(RECIPES[backbone])
    trunk = trunk or train.critic.trunk
    is_weightless = trunk in WEIGHTLESS_TRUNKS
    # The rate of a trunk with weights stands in the recipe that has one.
    rates = PPOConfig() if is_weightless else _preset("shapes-ppo").ppo
    return replace(
        train,
        critic=replace(train.critic, trunk=trunk),
        ppo=replace(
            train.ppo, trunk_learning_rate=rates.trunk_learning_rate, final_learning_rate=None, hold=None
        ),
        iterations=TrainConfig.iterations,
        eval_every=TrainConfig.eval_every,
    )


@cache
def _preset(name: str) -> TrainConfig:
    # The page asks for every arm many times, and YAML is slow to read.
    return recipe(name).train
