"""The algorithm in eager PyTorch.

A denoising trajectory is an episode: the state is (x_k, t_k, prompt), the action x_{k+1}, the policy
N(a x + b v, std^2 I) with the model's output v, and the reward comes after the last step. Source of the
method: "Explicit Critic Guidance for Aligning Diffusion Models" (arXiv 2605.27736).

Read `iteration` first, which is all of training on one page; then what it is made of, as it comes to it:

    noise        1. a counter-based generator, so that noise need not be kept
    transition   2. one step of a sampler and its log-probability
    advantages   3. GAE, and one number per step from several rewards
    policy       4. ratio, KL and loss, on `surrogate`, which has PPO's bounds
    critic       5. what a value head reads, and what it explains
    particles    6. resampling, for steering at inference; training does without
    forward_process   7. losses on clean latents noised anew, in the place of 2 and 4

Every op is one of these functions, with the same arguments. Half-precision inputs are computed in float32,
float64 stays float64.
"""

from lacfast.reference.advantages import gae, normalized_advantages
from lacfast.reference.critic import explained_variance, value_pool
from lacfast.reference.forward_process import awm_losses, nft_losses, noised
from lacfast.reference.iteration import train_iteration
from lacfast.reference.noise import normal_noise, philox
from lacfast.reference.particles import effective_sample_size, systematic_resample
from lacfast.reference.policy import log_ratio, ppo_loss
from lacfast.reference.transition import gaussian_step, gaussian_step_, step_log_prob

__all__ = [
    "awm_losses",
    "effective_sample_size",
    "explained_variance",
    "gae",
    "gaussian_step",
    "gaussian_step_",
    "log_ratio",
    "nft_losses",
    "noised",
    "normal_noise",
    "normalized_advantages",
    "philox",
    "ppo_loss",
    "step_log_prob",
    "systematic_resample",
    "train_iteration",
    "value_pool",
]
