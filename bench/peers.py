"""The peers' formulas in our own words, as what torch.compile is given to fuse.

flow_grpo's SDE step keeps sigma and its neighbour per sample, works out the transition from them every time,
and also returns the mean and the standard deviation. Its policy ratio is the exponential of the difference of
two mean log-probs.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor


def sde_transition(
    model_output: Tensor, sample: Tensor, sigma: Tensor, next_sigma: Tensor, noise_level: float
) -> tuple[Tensor, Tensor]:
    """Mean (B, C, H, W) and standard deviation (B, 1, 1, 1) of the flow SDE's step, in float32."""
    step_size = next_sigma - sigma
    diffusion = torch.sqrt(sigma / (1 - sigma)) * noise_level
    drift = diffusion**2 / (2 * sigma)
    mean = sample * (1 + drift * step_size) + model_output * (1 + drift * (1 - sigma)) * step_size
    return mean, diffusion * torch.sqrt(-step_size)


def mean_log_prob(prev_sample: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """(B,) log-density averaged over the elements, prev_sample held constant."""
    squared = (prev_sample.detach() - mean) ** 2
    log_prob = -squared / (2 * std**2) - torch.log(std) - math.log(math.sqrt(2 * math.pi))
    return log_prob.mean(dim=tuple(range(1, log_prob.ndim)))


def sde_step_with_log_prob(
    model_output: Tensor,
    sample: Tensor,
    sigma: Tensor,
    next_sigma: Tensor,
    noise: Tensor,
    noise_level: float,
    uncond_output: Tensor | None = None,
    guidance_scale: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sampling: the next latent, its log-prob, the mean and the standard deviation."""
    if uncond_output is not None:
        model_output = uncond_output + guidance_scale * (model_output - uncond_output)
    mean, std = sde_transition(model_output.float(), sample.float(), sigma, next_sigma, noise_level)
    prev_sample = mean + std * noise
    return prev_sample, mean_log_prob(prev_sample, mean, std), mean, std


def stored_log_prob(
    model_output: Tensor,
    sample: Tensor,
    prev_sample: Tensor,
    sigma: Tensor,
    next_sigma: Tensor,
    noise_level: float,
) -> Tensor:
    """Training: the log-prob (B,) of a stored transition."""
    mean, std = sde_transition(model_output.float(), sample.float(), sigma, next_sigma, noise_level)
    return mean_log_prob(prev_sample.float(), mean, std)


def clipped_loss(
    model_output: Tensor,
    sample: Tensor,
    prev_sample: Tensor,
    old_log_prob: Tensor,
    advantages: Tensor,
    sigma: Tensor,
    next_sigma: Tensor,
    *,
    noise_level: float,
    clip_range: float,
) -> Tensor:
    """Training: the clipped surrogate of a stored transition."""
    log_prob = stored_log_prob(model_output, sample, prev_sample, sigma, next_sigma, noise_level)
    ratio = torch.exp(log_prob - old_log_prob)
    unclipped = -advantages * ratio
    clipped = -advantages * torch.clamp(ratio, 1.0 - clip_range, 1.0 + clip_range)
    return torch.maximum(unclipped, clipped).mean()


def gae_loop(rewards: Tensor, values: Tensor, gamma: float, gae_lambda: float) -> tuple[Tensor, Tensor]:
    """The textbook loop over time, vectorised over the batch: (B, T, M) -> advantages, returns."""
    advantages = torch.zeros_like(rewards)
    last = torch.zeros_like(rewards[:, 0])
    steps = rewards.shape[1]
    for t in reversed(range(steps)):
        next_values = values[:, t + 1] if t + 1 < steps else 0.0
        delta = rewards[:, t] + gamma * next_values - values[:, t]
        last = delta + gamma * gae_lambda * last
        advantages[:, t] = last
    return advantages, advantages + values


def gae_vectorized(rewards: Tensor, values: Tensor, gamma: float, gae_lambda: float) -> tuple[Tensor, Tensor]:
    """The sum that the loop unrolls to, as a product with a triangle of powers: (B, T, M) -> the same."""
    steps = torch.arange(rewards.shape[1], dtype=rewards.dtype, device=rewards.device)
    distance = steps[None, :] - steps[:, None]
    powers = torch.where(distance >= 0, (gamma * gae_lambda) ** distance, 0.0)
    next_values = torch.nn.functional.pad(values[:, 1:], (0, 0, 0, 1))
    advantages = torch.matmul(powers, rewards + gamma * next_values - values)
    return advantages, advantages + values


def normalized_advantages(
    rewards: Tensor,
    values: Tensor,
    reward_mean: Tensor,
    reward_std: Tensor,
    weights: Tensor,
    gamma: float,
    gae_lambda: float,
    bounds: tuple[float, float],
) -> tuple[Tensor, Tensor, Tensor]:
    """The pipeline as trainers write it: standardise, loop, each head by its deviation, sum, whiten."""
    standardized = torch.zeros_like(values)
    standardized[:, -1] = (rewards - reward_mean) / reward_std
    advantages, _ = gae_loop(standardized, values, gamma, gae_lambda)
    _, targets = gae_loop(standardized, values, gamma, 1.0)
    heads = advantages.flatten(0, 1)
    combined = ((advantages / heads.std(dim=0)) * weights).sum(dim=-1)
    whitened = (combined - combined.mean()) / combined.std()
    return whitened.clamp(-bounds[0], bounds[0]), advantages, targets.clamp(-bounds[1], bounds[1])


def rms_norm(features: Tensor, weight: Tensor, eps: float) -> Tensor:
    return torch.nn.functional.rms_norm(features, features.shape[-1:], weight, eps)


def attention_pool(
    features: Tensor,
    query: Tensor,
    norm_weight: Tensor,
    eps: float = 1e-6,
    norm: Callable[[Tensor, Tensor, float], Tensor] = rms_norm,
) -> Tensor:
    """Single-query pooling as heads write it, in the features' dtype: RMSNorm, scores, softmax, sum."""
    tokens = norm(features, norm_weight.to(features.dtype), eps)
    weights = torch.softmax((query.to(features.dtype) @ tokens.mT).float(), dim=-1)
    return (weights.to(features.dtype) @ tokens).float()
