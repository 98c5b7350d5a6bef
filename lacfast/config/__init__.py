"""Settings as frozen dataclasses: the docstring under a field gives unit, range and source of its default."""

from lacfast.config.advantages import (
    COMBINATIONS,
    DDPO,
    ESTIMATORS,
    GRPO,
    AdvantageConfig,
    BatchMean,
    CriticValues,
    GroupBaseline,
    LeaveOneOut,
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
from lacfast.config.objective import AWM, NFT, PPO, ForwardProcess
from lacfast.config.pipeline import PipelineSettings
from lacfast.config.ppo import KL_KINDS, RATIOS, Hold, KLMask, KLPenalty, Nats, PPOConfig, Ratio
from lacfast.config.sampling import Fixed, Random, SamplerConfig, Sliding
from lacfast.config.steering import GUIDANCE_FORMS, STEERING_METHODS, SteeringConfig
from lacfast.config.stored import from_json, to_json
from lacfast.config.training import EarlyStoppingConfig, TrainConfig, ValuePretrainingConfig
from lacfast.config.unread import variant

__all__ = [
    "AWM",
    "COMBINATIONS",
    "DDPO",
    "ESTIMATORS",
    "GRPO",
    "GUIDANCE_FORMS",
    "KL_KINDS",
    "NFT",
    "PPO",
    "RATIOS",
    "STEERING_METHODS",
    "TAPPED_TRUNKS",
    "TEXT_CONDITIONINGS",
    "TRUNKS",
    "VALUE_LOSSES",
    "AdvantageConfig",
    "BatchMean",
    "CriticConfig",
    "CriticValues",
    "EarlyStoppingConfig",
    "Fixed",
    "ForwardProcess",
    "GraphConfig",
    "GraphMode",
    "GroupBaseline",
    "Hold",
    "KLMask",
    "KLPenalty",
    "LeaveOneOut",
    "LoRAConfig",
    "Nats",
    "PPOConfig",
    "PipelineSettings",
    "Random",
    "Ratio",
    "SamplerConfig",
    "Sliding",
    "SteeringConfig",
    "TrainConfig",
    "ValuePretrainingConfig",
    "from_json",
    "to_json",
    "variant",
]
