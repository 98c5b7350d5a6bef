"""The C++ kernels, one file per op. No checks here; arguments are those that the ops have checked."""

from lacfast.ops.cpu.advantages import advantage_apply, advantage_sums, normalized_advantages
from lacfast.ops.cpu.gae import gae, gae_backward
from lacfast.ops.cpu.gaussian_step import gaussian_step
from lacfast.ops.cpu.noise import normal_noise
from lacfast.ops.cpu.ppo_loss import (
    log_ratio_backward,
    log_ratio_forward,
    ppo_loss_backward,
    ppo_loss_forward,
)
from lacfast.ops.cpu.smc import effective_sample_size, systematic_resample
from lacfast.ops.cpu.step_log_prob import step_log_prob, step_log_prob_backward
from lacfast.ops.cpu.value_pool import value_pool_backward, value_pool_forward

__all__ = [
    "advantage_apply",
    "advantage_sums",
    "effective_sample_size",
    "gae",
    "gae_backward",
    "gaussian_step",
    "log_ratio_backward",
    "log_ratio_forward",
    "normal_noise",
    "normalized_advantages",
    "ppo_loss_backward",
    "ppo_loss_forward",
    "step_log_prob",
    "step_log_prob_backward",
    "systematic_resample",
    "value_pool_backward",
    "value_pool_forward",
]
