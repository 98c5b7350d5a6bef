"""The fused operations: each has the name and signature of its equation in lacfast.reference."""

from lacfast.ops.advantages import normalized_advantages
from lacfast.ops.backend import available, backend
from lacfast.ops.gae import gae
from lacfast.ops.gaussian_step import gaussian_step
from lacfast.ops.gaussian_step_in_place import gaussian_step_
from lacfast.ops.noise import normal_noise
from lacfast.ops.ppo_loss import log_ratio, ppo_loss
from lacfast.ops.smc import effective_sample_size, systematic_resample
from lacfast.ops.step_log_prob import step_log_prob
from lacfast.ops.value_pool import value_pool

__all__ = [
    "available",
    "backend",
    "effective_sample_size",
    "gae",
    "gaussian_step",
    "gaussian_step_",
    "log_ratio",
    "normal_noise",
    "normalized_advantages",
    "ppo_loss",
    "step_log_prob",
    "systematic_resample",
    "value_pool",
]
