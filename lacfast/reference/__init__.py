"""The algorithm in eager PyTorch, in reading order: noise, transition, policy, advantages, critic.

Every fast path is one of these functions with the same name and signature. Source of the method:
"Explicit Critic Guidance for Aligning Diffusion Models" (arXiv 2605.27736).

A denoising trajectory is an episode: the state is (x_k, t_k, prompt), the action x_{k+1}, the policy
N(a x + b v, std^2 I) with the model's output v, the reward comes after the last step.
Half-precision inputs are computed in float32, float64 stays float64.
"""

from lacfast.reference.advantages import gae
from lacfast.reference.critic import explained_variance, value_pool
from lacfast.reference.noise import normal_noise, philox
from lacfast.reference.policy import log_ratio, ppo_loss
from lacfast.reference.transition import gaussian_step, step_log_prob

__all__ = [
    "explained_variance",
    "gae",
    "gaussian_step",
    "log_ratio",
    "normal_noise",
    "philox",
    "ppo_loss",
    "step_log_prob",
    "value_pool",
]
