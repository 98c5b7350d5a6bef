"""The algorithm in eager PyTorch, in reading order: noise, transition, policy, advantages, particles, critic.

Every fast path is one of these functions with the same name and signature. Source of the method:
"Explicit Critic Guidance for Aligning Diffusion Models" (arXiv 2605.27736).

A denoising trajectory is an episode: the state is (x_k, t_k, prompt), the action x_{k+1}, the policy
N(a x + b v, std^2 I) with the model's output v, the reward comes after the last step.
Half-precision inputs are computed in float32, float64 stays float64.
"""

from lacfast.reference.advantages import gae, normalized_advantages
from lacfast.reference.critic import explained_variance, value_pool
from lacfast.reference.noise import normal_noise, philox
from lacfast.reference.particles import effective_sample_size, systematic_resample
from lacfast.reference.policy import log_ratio, ppo_loss
from lacfast.reference.transition import gaussian_step, gaussian_step_, step_log_prob

__all__ = [
    "effective_sample_size",
    "explained_variance",
    "gae",
    "gaussian_step",
    "gaussian_step_",
    "log_ratio",
    "normal_noise",
    "normalized_advantages",
    "philox",
    "ppo_loss",
    "step_log_prob",
    "systematic_resample",
    "value_pool",
]
