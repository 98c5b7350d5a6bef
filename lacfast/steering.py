"""Steering at inference by the trained critic: particles pruned by their value, and guidance by its gradient.

The value of a noisy latent comes with the forward that samples it, so pruning costs no forward of its own:
4 -> 2 -> 1 particles over T = 8 steps take 25 forwards per image where best-of-4 takes 32. Guidance moves
the model output along the value gradient, by a fraction of its own length; a step with a gradient counts
three forwards.
Source: arXiv 2605.27736; the step-relative scale and the pruning are ours.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lacfast import ops
from lacfast.config import SamplerConfig, SteeringConfig
from lacfast.critic import Critic
from lacfast.protocols import Backbone
from lacfast.records import INITIAL_STEP, Conditioning, NoiseKey, TransitionTable

SIGN_TEST_MOVE = 0.01
"""Length of the sign test's move, as a fraction of the latent's."""


@dataclass(frozen=True)
class SteeringStats:
    """What steering cost and what the critic made of it."""

    forwards_per_image: float
    """NFE: forwards of the model, a backward counted as two."""
    values: Tensor
    """(T, n) value of the surviving trajectory at every step."""
    gradient_gain: float
    """Mean rise of V after a small move along its gradient, the sign test. NaN without guidance."""


@dataclass
class _Particles:
    """Trajectories in flight, consecutive `per_image` belong to one image."""

    sample: Tensor
    rows: Tensor
    ids: Tensor
    per_image: int
    values: list[Tensor]

    def keep_best_half(self, values: Tensor) -> Tensor:
        """Drop the worse half of every image's particles by values (P,); returns the kept positions."""
        grouped = values.view(-1, self.per_image)
        kept = grouped.topk(self.per_image // 2, dim=1).indices.sort(dim=1).values
        offsets = torch.arange(len(grouped), device=values.device)[:, None] * self.per_image
        positions = (kept + offsets).flatten()
        self.sample, self.rows, self.ids = self.sample[positions], self.rows[positions], self.ids[positions]
        self.per_image //= 2
        self.values = [earlier[positions] for earlier in self.values]
        return positions


def steer(
    backbone: Backbone,
    prompts: Sequence[str],
    config: SteeringConfig | None = None,
    *,
    sampler: SamplerConfig | None = None,
    head_weights: Tensor | None = None,
) -> tuple[Tensor, SteeringStats]:
    """Images of `prompts`, sampled with the critic's help.

    Args:
        backbone: with a trained critic.
        prompts: n prompts.
        config: method and strength.
        sampler: as in training; the critic knows the states of that sampler.
        head_weights: (M,) weight of each value head. None: equal.

    Returns:
        images (n, 3, H, W) float in [0, 1] and what it cost.

    Raises:
        ValueError: without a critic, or with classifier-free guidance, which this loop does not run.
    """
    config, sampler = config or SteeringConfig(), sampler or SamplerConfig()
    if sampler.guidance_scale > 1:
        raise ValueError(
            f"guidance_scale={sampler.guidance_scale} would be ignored: steering samples without "
            "classifier-free guidance; use guidance_scale=1 and a critic that was trained so"
        )
    if backbone.critic is None:
        raise ValueError(
            "steering needs a critic; load a backbone that was saved with one, "
            "or train one with LatentActorCriticTrainer"
        )
    table = backbone.transition_table(sampler)
    device = next(backbone.model.parameters()).device
    weights = torch.ones(backbone.critic.num_rewards) if head_weights is None else head_weights
    images, values, forwards, gains = [], [], 0.0, []
    for start in range(0, len(prompts), config.batch_size):
        part = list(prompts[start : start + config.batch_size])
        ids = torch.arange(start * config.particles, (start + len(part)) * config.particles, device=device)
        particles = _start(backbone, config, part, ids)
        cost, gain = _run(backbone, backbone.critic, table, config, part, particles, weights.to(device))
        images.append(backbone.decode(particles.sample))
        values.append(torch.stack(particles.values))
        forwards += cost
        gains.append(gain)
    stats = SteeringStats(forwards / len(prompts), torch.cat(values, dim=1), sum(gains) / len(gains))
    return torch.cat(images), stats


def _start(backbone: Backbone, config: SteeringConfig, prompts: list[str], ids: Tensor) -> _Particles:
    shape = (len(ids), *backbone.latent_shape)
    steps = torch.full_like(ids, INITIAL_STEP)
    noise = ops.normal_noise(shape, steps, NoiseKey.create(config.seed, ids, ids.device))
    rows = torch.arange(len(prompts), device=ids.device).repeat_interleave(config.particles)
    return _Particles(noise, rows, ids, config.particles, [])


def _run(
    backbone: Backbone,
    critic: Critic,
    table: TransitionTable,
    config: SteeringConfig,
    prompts: list[str],
    particles: _Particles,
    weights: Tensor,
) -> tuple[float, float]:
    """Denoise all particles of a batch in place; returns the forwards and the gain of the sign test."""
    batch_conditioning = backbone.encode_prompts(prompts)
    coefficients = table.coefficients(particles.sample.device)
    prune_steps = [round(fraction * table.num_steps) for fraction in config.prune_fractions]
    low, high = config.guidance_window
    forwards, gain = 0.0, math.nan
    for step, timestep in enumerate(table.timesteps.tolist()):
        guided = config.guidance_weight > 0 and low < float(table.sigmas[step]) < high
        state = _State(
            particles.sample,
            torch.full_like(particles.ids, timestep).float(),
            batch_conditioning.select(particles.rows),
        )
        output, values, gradient = _evaluate(backbone, critic, state, weights, guided)
        forwards += len(values) * (3 if guided else 1)
        if gradient is not None and math.isnan(gain):
            gain = _sign_test(backbone, critic, state, weights, values, gradient)
            forwards += len(values)
        particles.values.append(values)
        if step in prune_steps and particles.per_image > 1:
            kept = particles.keep_best_half(values)
            output, gradient = output[kept], None if gradient is None else gradient[kept]
        if gradient is not None:
            output = _along_gradient(output, gradient, config.guidance_weight, float(table.b[step]))
        noise = NoiseKey.create(config.seed, particles.ids, particles.ids.device)
        steps = torch.full_like(particles.ids, step)
        particles.sample = ops.gaussian_step(
            particles.sample, output.contiguous(), coefficients, steps, noise=noise
        ).prev_sample
    while particles.per_image > 1:
        particles.keep_best_half(particles.values[-1])
    return forwards, gain


@dataclass(frozen=True)
class _State:
    sample: Tensor
    timestep: Tensor
    conditioning: Conditioning


def _evaluate(
    backbone: Backbone, critic: Critic, state: _State, weights: Tensor, with_gradient: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Model output (P, ...), weighted value (P,) and, when asked for, the value's gradient (P, ...)."""
    with torch.set_grad_enabled(with_gradient):
        sample = state.sample.detach().requires_grad_(with_gradient)
        with critic.record(backbone.model, detach=not with_gradient) as features:
            output = backbone.predict(sample, state.timestep, state.conditioning)
        values = critic(features, sample, state.timestep, state.conditioning) @ weights
        gradient = torch.autograd.grad(values.sum(), sample)[0] if with_gradient else None
    return output.detach(), values.detach(), gradient


def _per_sample_norm(tensor: Tensor) -> Tensor:
    """(B, 1, ...)"""
    norm: Tensor = torch.linalg.vector_norm(tensor.flatten(1), dim=1).clamp(min=1e-12)
    return norm.view(-1, *(1,) * (tensor.ndim - 1))


def _along_gradient(output: Tensor, gradient: Tensor, weight: float, b: float) -> Tensor:
    """v - sign(-b) weight |v| g / |g|: x' = a x + b v then moves along +g whatever the sign of b."""
    move = weight * _per_sample_norm(output) * gradient / _per_sample_norm(gradient)
    return output + move if b > 0 else output - move


def _sign_test(
    backbone: Backbone, critic: Critic, state: _State, weights: Tensor, values: Tensor, gradient: Tensor
) -> float:
    """Mean rise of V when the latents move by SIGN_TEST_MOVE of their length along its gradient.

    Raises:
        ValueError: when it does not rise, for then the gradient is not one of this value function.
    """
    move = SIGN_TEST_MOVE * _per_sample_norm(state.sample) * gradient / _per_sample_norm(gradient)
    moved = replace(state, sample=state.sample + move)
    gain = float((_evaluate(backbone, critic, moved, weights, False)[1] - values).mean())
    if not gain > 0:
        raise ValueError(
            f"V changed by {gain:.3g} along its own gradient, so it cannot guide; "
            "train the critic longer or use pruning"
        )
    return gain
