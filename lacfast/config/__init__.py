"""Settings as frozen dataclasses: the docstring under a field gives unit, range and source of its default."""

from lacfast.config.advantages import (
    COMBINATIONS,
    CRITIC_ESTIMATORS,
    ESTIMATORS,
    GROUP_ESTIMATORS,
    AdvantageConfig,
)
from lacfast.config.critic import (
    TAPPED_TRUNKS,
    TEXT_CONDITIONINGS,
    TRUNKS,
    VALUE_LOSSES,
    CriticConfig,
    LoRAConfig,
)
from lacfast.config.graph import GraphConfig, GraphMode
from lacfast.config.ppo import KL_KINDS, RATIOS, PPOConfig
from lacfast.config.sampling import SamplerConfig
from lacfast.config.steering import GUIDANCE_FORMS, STEERING_METHODS, SteeringConfig
from lacfast.config.training import EarlyStoppingConfig, TrainConfig, ValuePretrainingConfig

__all__ = [
    "COMBINATIONS",
    "CRITIC_ESTIMATORS",
    "ESTIMATORS",
    "GROUP_ESTIMATORS",
    "GUIDANCE_FORMS",
    "KL_KINDS",
    "RATIOS",
    "STEERING_METHODS",
    "TAPPED_TRUNKS",
    "TEXT_CONDITIONINGS",
    "TRUNKS",
    "VALUE_LOSSES",
    "AdvantageConfig",
    "CriticConfig",
    "EarlyStoppingConfig",
    "GraphConfig",
    "GraphMode",
    "LoRAConfig",
    "PPOConfig",
    "SamplerConfig",
    "SteeringConfig",
    "TrainConfig",
    "ValuePretrainingConfig",
]
