"""One pass of learning over a rollout's (sample, step) pairs: PPO on the actor, regression on the critic."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from lacfast import ops
from lacfast.advantages import Advantages
from lacfast.config import PPOConfig
from lacfast.critic import Critic
from lacfast.ops.checks import arithmetic_dtype
from lacfast.profiling import each, span
from lacfast.protocols import Backbone, Features
from lacfast.records import PPOStats, Rollout, TransitionTable
from lacfast.sampler import PolicyOutput, policy_output
from lacfast.schedule import kl_gains


@dataclass(frozen=True)
class Pairs:
    """Flattened (step, row) indices into a rollout, P of them."""

    steps: Tensor
    """(P,) int64 row of the transition table."""
    rows: Tensor
    """(P,) int64 trajectory."""
    position: Tensor
    """(P,) int64 index of the step among those that are paired."""

    def __len__(self) -> int:
        return len(self.rows)

    def select(self, index: Tensor) -> Pairs:
        return Pairs(self.steps[index], self.rows[index], self.position[index])

    def split(self, size: int) -> Iterator[Pairs]:
        for start in range(0, len(self), size):
            yield Pairs(
                self.steps[start : start + size],
                self.rows[start : start + size],
                self.position[start : start + size],
            )

    def shuffled(self, generator: torch.Generator) -> Pairs:
        return self.select(torch.randperm(len(self), generator=generator).to(self.rows.device))


def all_pairs(steps: Tensor, batch_size: int) -> Pairs:
    """Every pair of one of the `steps` (K,) and a trajectory."""
    position = torch.arange(len(steps), device=steps.device).repeat_interleave(batch_size)
    rows = torch.arange(batch_size, device=steps.device).repeat(len(steps))
    return Pairs(steps[position], rows, position)


def minibatches(
    pairs: Pairs, count: int, generator: torch.Generator, *, fraction: float = 1.0
) -> Iterator[Pairs]:
    """A random `fraction` of the pairs in `count` parts of about equal size."""
    chosen = math.ceil(fraction * len(pairs))
    return next(pairs.shuffled(generator).split(chosen)).split(math.ceil(chosen / count))


def policy_optimizer(parameters: Iterable[nn.Parameter], config: PPOConfig) -> torch.optim.AdamW:
    """AdamW over the actor's trained weights, see Backbone.policy_parameters."""
    return torch.optim.AdamW(
        parameters,
        lr=config.policy_learning_rate,
        betas=config.betas,
        eps=config.adam_eps,
        weight_decay=config.weight_decay,
        fused=True,
    )


def warmup(optimizer: Optimizer, steps: int) -> LRScheduler:
    """A schedule whose learning rate rises linearly to the optimizer's over its first `steps` steps."""
    return LambdaLR(optimizer, lambda step: min((step + 1) / (steps + 1), 1.0))


def critic_optimizer(critic: Critic | None, config: PPOConfig) -> torch.optim.AdamW | None:
    """AdamW over the critic's head and own trunk, each at its rate; None without a critic."""
    if critic is None:
        return None
    groups = [
        {"params": list(critic.head.parameters()), "lr": config.value_learning_rate},
        {"params": list(critic.trunk.parameters()), "lr": config.trunk_learning_rate},
    ]
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, betas=config.betas, weight_decay=config.weight_decay, fused=True)


def _require_finite(what: str, norm: Tensor) -> float:
    with span("sync"):
        value = float(norm)
    if not math.isfinite(value):
        raise FloatingPointError(
            f"the gradient norm of the {what} is {value}; no optimizer step was taken and the weights are "
            "as before. Lower the learning rate or the clip range, and check the rewards"
        )
    return value


def policy_step(
    backbone: Backbone,
    reference: Backbone | None,
    optimizer: Optimizer,
    rollout: Rollout,
    advantages: Advantages,
    pairs: Pairs,
    config: PPOConfig,
    guidance_scale: float,
) -> tuple[PPOStats, Tensor, float]:
    """One optimizer step of the actor on a minibatch; returns statistics (P,), loss () and gradient norm."""
    optimizer.zero_grad(set_to_none=True)
    coefficients = rollout.table.coefficients(rollout.latents.device, arithmetic_dtype(rollout.latents))
    weights = step_weights(rollout.table, balanced=config.balance_steps).to(coefficients)
    gains = None
    if reference is not None:
        gains = kl_gains(rollout.table, config.kl, device=coefficients.device, dtype=coefficients.dtype)
    # Under "joint" the value's gradient enters the actor here; the head itself learns in critic_step.
    critic = backbone.critic
    joint = critic if critic is not None and critic.config.trunk == "joint" else None
    stats, losses = [], []
    for part in each("update/microbatch", pairs.split(config.microbatch_size)):
        forward = _policy_output(backbone, rollout, part, config.cfg_grad, joint)
        with torch.no_grad():
            reference_output = (
                None
                if reference is None
                else _guided(_policy_output(reference, rollout, part, "cond"), guidance_scale)
            )
        loss, part_stats = ops.ppo_loss(
            _guided(forward, guidance_scale),
            rollout.model_outputs[part.steps, part.rows],
            advantages.policy[part.position, part.rows],
            coefficients,
            part.steps,
            noise=rollout.noise.select(part.rows),
            clip_range=config.clip_range,
            clip_nats=config.clip_nats,
            kl_threshold=config.kl_threshold,
            dual_clip=config.dual_clip,
            ratio=config.ratio,
            step_weights=weights,
            reference_output=reference_output,
            kl_weight=config.kl_weight,
            kl_gains=gains,
        )
        if joint is not None:
            outputs = critic_outputs(joint, rollout, part, forward.features)
            value_loss = joint.loss(outputs, advantages.targets[part.rows])
            loss = loss + joint.config.joint_weight * value_loss
        share = len(part) / len(pairs)
        (loss * share).backward()  # type: ignore[no-untyped-call]
        losses.append(loss.detach() * share)
        stats.append(part_stats)
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    norm = _require_finite("policy", nn.utils.clip_grad_norm_(trained, config.max_grad_norm))
    with span("optimizer"):
        optimizer.step()
    return PPOStats.concatenate(stats), torch.stack(losses).sum(), norm


def step_weights(table: TransitionTable, *, balanced: bool) -> Tensor:
    """(T,) weight of each step in the policy loss, 1 on average over the trained ones; see balance_steps."""
    if not balanced:
        return torch.ones_like(table.std)
    weights = table.std / table.b.abs()
    return weights / weights[table.trainable_steps].mean()


def _policy_output(
    backbone: Backbone, rollout: Rollout, pairs: Pairs, cfg_grad: str, critic: Critic | None = None
) -> PolicyOutput:
    sample = rollout.latents[pairs.steps, pairs.rows]
    timestep = rollout.table.timesteps.to(sample.device)[pairs.steps]
    uncond = None if rollout.uncond_conditioning is None else rollout.uncond_conditioning.select(pairs.rows)
    conditioning = rollout.conditioning.select(pairs.rows)
    return policy_output(
        backbone, sample, timestep, conditioning, uncond, cfg_grad=cfg_grad, critic=critic, detach=False
    )


def _guided(forward: PolicyOutput, guidance_scale: float) -> Tensor:
    cond, uncond = forward.output, forward.uncond_output
    # One rounding of scale * difference + uncond, as the kernel has: the first ratio is then exactly 1.
    guided = cond if uncond is None else torch.add(uncond, cond - uncond, alpha=guidance_scale)
    return guided.contiguous()


def all_states(rollout: Rollout) -> Pairs:
    """The pairs that the critic learns from: every state, also those whose step is deterministic."""
    return all_pairs(torch.arange(rollout.table.num_steps, device=rollout.latents.device), rollout.batch_size)


def kept_features(rollout: Rollout, pairs: Pairs) -> Features:
    """What the rollout kept for the critic of these pairs, name -> (P, ...)."""
    return {name: tensor[pairs.steps, pairs.rows] for name, tensor in rollout.features.items()}


def critic_outputs(critic: Critic, rollout: Rollout, pairs: Pairs, features: Features) -> Tensor:
    """The head's outputs (P, M, K) for the rollout's states on `features` (P, ...) of the actor."""
    sample = rollout.latents[pairs.steps, pairs.rows]
    timestep = rollout.table.timesteps.to(sample.device)[pairs.steps]
    return critic.outputs(features, sample, timestep, rollout.conditioning.select(pairs.rows))


def critic_step(
    critic: Critic,
    optimizer: Optimizer,
    rollout: Rollout,
    targets: Tensor,
    pairs: Pairs,
    config: PPOConfig,
    *,
    old_values: Tensor | None = None,
) -> tuple[Tensor, float]:
    """One critic optimizer step towards standardised targets (B, M); returns loss () and gradient norm.

    `old_values` (T, B, M) are those of the rollout in today's units, for CriticConfig.value_clip.
    """
    optimizer.zero_grad(set_to_none=True)
    losses = []
    for part in each("update/microbatch", pairs.split(config.microbatch_size)):
        outputs = critic_outputs(critic, rollout, part, kept_features(rollout, part))
        old = None if old_values is None else old_values[part.steps, part.rows]
        loss = critic.loss(outputs, targets[part.rows], old)
        share = len(part) / len(pairs)
        (loss * share).backward()  # type: ignore[no-untyped-call]
        losses.append(loss.detach() * share)
    norm = _require_finite("critic", nn.utils.clip_grad_norm_(critic.parameters(), config.max_grad_norm))
    with span("optimizer"):
        optimizer.step()
    return torch.stack(losses).sum(), norm
