"""Iteration: latent actor-critic training on one page, as one would write it first.

    collect   x_{k+1} = a_k x_k + b_k v(x_k, t_k, y) + std_k eps_k,   k = 0 .. T - 1;   R = reward(x_T)
    credit    A_k = R - V(x_k, t_k, y),   standardised over all trajectories and steps
    actor     maximise  min( rho A, clip(rho, 1 - c, 1 + c) A ) - kl_weight KL(policy, anchor)
    critic    minimise  ( V(x_k, t_k, y) - R )^2

Source: "Explicit Critic Guidance for Aligning Diffusion Models" (arXiv 2605.27736). The trainer does the
same on fused kernels, captured graphs and many devices; a test holds it to this page.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from torch.optim import Optimizer

from lacfast.records import INITIAL_STEP, Conditioning, NoiseKey, NormalizedAdvantages, TransitionTable
from lacfast.reference.advantages import normalized_advantages
from lacfast.reference.noise import normal_noise
from lacfast.reference.policy import ppo_loss
from lacfast.reference.transition import gaussian_step
from lacfast.seeds import epoch_seed

Model = Callable[[Tensor, Tensor, Conditioning], Tensor]
"""(sample (P, ...), timestep (P,), conditioning (P, ...)) -> output (P, ...), or a critic's values (P, M)."""


def train_iteration(
    policy: Model,
    critic: Model,
    reward: Callable[[Tensor], Tensor],
    reward_statistics: Callable[[Tensor], tuple[Tensor, Tensor]],
    table: TransitionTable,
    conditioning: Conditioning,
    noise: NoiseKey,
    *,
    latent_shape: tuple[int, ...],
    weights: Tensor,
    policy_optimizer: Optimizer,
    critic_optimizer: Optimizer,
    iteration: int,
    num_inner_epochs: int = 1,
    num_minibatches: int = 4,
    gae_lambda: float = 1.0,
    clip_range: float = 1e-4,
    anchor: Model | None = None,
    kl_weight: float = 0.0,
    max_grad_norm: float = 1.0,
) -> tuple[Tensor, NormalizedAdvantages]:
    """Train policy and critic in place on B trajectories; returns their rewards (B, M) and advantages.

    Args:
        policy: the diffusion model, `guided` or not.
        critic: predicts the standardised rewards from any noisy latent.
        reward: decodes clean latents (B, ...) and scores them: (B, M).
        reward_statistics: takes in rewards (B, M) and returns their running mean and deviation (M,); rescales
            the critic's last layer, so that no raw prediction changes (PopArt, arXiv 1602.07714).
        table: the sampler; the policy is trained where its std is not 0.
        conditioning, noise: (B, ...) of the prompts; seed and B sample ids, which every eps is a function of.
        latent_shape: (C, H, W), or (L, D) for packed latents.
        weights: (M,) of the rewards in the advantage.
        policy_optimizer: Adam's eps near 1e-15, far below the gradients of a log-ratio per element.
        critic_optimizer, max_grad_norm: the critic's; bound of the gradient's norm in every optimizer step.
        iteration: with the seed, decides the order of the minibatches.
        num_inner_epochs, num_minibatches: passes over the trajectories, optimizer steps of each.
        gae_lambda: of the policy's advantages; 1 gives A = R - V.
        clip_range: c, in nats per element.
        anchor, kl_weight: the frozen policy from which the KL is measured, and its weight. None: no KL.
    """
    # Collect. The policy that samples is the old policy of every ratio.
    latents, model_outputs = rollout(policy, table, conditioning, noise, latent_shape)
    rewards = reward(latents[-1])

    # Credit. How much better was the reward than the critic expected before the step?
    mean, std = reward_statistics(rewards)
    coefficients, timesteps = table.coefficients(latents.device), table.timesteps.to(latents.device)
    with torch.no_grad():
        states = zip(latents[:-1], timesteps, strict=True)
        values = torch.stack([critic(x, t.expand(len(x)), conditioning) for x, t in states], dim=1)
    all_steps = torch.arange(table.num_steps, device=latents.device)
    trained = all_steps[coefficients[:, 2] > 0]
    learned = normalized_advantages(rewards, values[:, trained], mean, std, weights, gae_lambda=gae_lambda)
    advantages = torch.zeros_like(values[..., 0]).index_copy(1, trained, learned.advantages)

    # Learn. Every pair of a step and a trajectory is a sample; a run that is resumed draws them alike.
    for epoch in range(num_inner_epochs):
        generator = torch.Generator().manual_seed(epoch_seed(int(noise.seed), iteration, epoch))
        for steps, rows in minibatches(trained, len(rewards), num_minibatches, generator):
            state = latents[steps, rows], timesteps[steps], conditioning.select(rows)
            policy_loss, _ = ppo_loss(
                *(policy(*state), model_outputs[steps, rows], advantages[rows, steps], coefficients, steps),
                noise=noise.select(rows),
                clip_range=clip_range,
                anchor_output=None if anchor is None else anchor(*state),
                kl_weight=kl_weight,
            )
            descend(policy_loss, policy_optimizer, max_grad_norm)
        for steps, rows in minibatches(all_steps, len(rewards), num_minibatches, generator):
            predicted = critic(latents[steps, rows], timesteps[steps], conditioning.select(rows))
            value_loss = (predicted - learned.targets[rows, -1]).square().mean()
            descend(value_loss, critic_optimizer, max_grad_norm)
    return rewards, learned


@torch.no_grad()
def rollout(
    policy: Model, table: TransitionTable, conditioning: Conditioning, noise: NoiseKey, shape: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    """Latents (T + 1, B, ...) from pure noise to clean ones, and the outputs (T, B, ...) that led there."""
    ids = noise.sample_ids
    coefficients, timesteps = table.coefficients(ids.device), table.timesteps.to(ids.device)
    latents, model_outputs = [normal_noise((len(ids), *shape), torch.full_like(ids, INITIAL_STEP), noise)], []
    for step in range(table.num_steps):
        steps = torch.full_like(ids, step)
        model_outputs.append(policy(latents[-1], timesteps[steps], conditioning))
        moved = gaussian_step(latents[-1], model_outputs[-1], coefficients, steps, noise=noise)
        latents.append(moved.prev_sample)
    return torch.stack(latents), torch.stack(model_outputs)


def guided(model: Model, unconditional: Conditioning, guidance_scale: float) -> Model:
    """The model under classifier-free guidance (arXiv 2207.12598), trained through its conditional half."""

    def policy(sample: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
        with torch.no_grad():
            uncond = model(sample, timestep, unconditional.padded(len(sample)))
        return uncond + guidance_scale * (model(sample, timestep, conditioning) - uncond)

    return policy


def minibatches(
    steps: Tensor, batch_size: int, count: int, generator: torch.Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    """All pairs of a step and a trajectory, (P,) each, in random order in `count` parts."""
    order = torch.randperm(len(steps) * batch_size, generator=generator).to(steps.device)
    for part in order.tensor_split(count):
        yield steps[part // batch_size], part % batch_size


def descend(loss: Tensor, optimizer: Optimizer, max_grad_norm: float) -> None:
    """One optimizer step on the loss; the norm of all gradients together is at most `max_grad_norm`."""
    optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    clip_grad_norm_([weight for group in optimizer.param_groups for weight in group["params"]], max_grad_norm)
    optimizer.step()
