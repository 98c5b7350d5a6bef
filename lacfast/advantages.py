"""From rewards to advantages: standardisation, GAE per reward head, combination of heads, group baselines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lacfast import ops
from lacfast.records import RewardCondition, Rollout

_TINY = 1e-8


@dataclass
class RewardNormalizer:
    """Running mean and standard deviation per reward over all samples (Chan et al.'s parallel update)."""

    mean: Tensor
    """(M,) float64"""
    variance: Tensor
    """(M,) float64, of the population."""
    count: float = 0.0
    """Samples seen, bounded by `window`."""
    window: float = 5000.0
    """Older samples are forgotten at this scale, so that the statistics follow the policy."""

    @staticmethod
    def create(num_rewards: int, *, window: float = 5000.0) -> RewardNormalizer:
        return RewardNormalizer(
            torch.zeros(num_rewards).double(), torch.zeros(num_rewards).double(), 0.0, window
        )

    @property
    def std(self) -> Tensor:
        """(M,) float64; 1 for a reward that has not varied."""
        std = self.variance.sqrt()
        return torch.where(std > _TINY, std, torch.ones_like(std))

    def update(self, rewards: Tensor) -> None:
        """Take in rewards (B, M)."""
        batch = rewards.detach().double().cpu()
        batch_count = float(len(batch))
        total = self.count + batch_count
        shift = batch.mean(dim=0) - self.mean
        within = self.count * self.variance + batch_count * batch.var(dim=0, correction=0)
        self.variance = (within + shift**2 * self.count * batch_count / total) / total
        self.mean = self.mean + shift * batch_count / total
        self.count = min(total, self.window)

    def restore(self, other: RewardNormalizer) -> None:
        """Take over another normalizer's statistics."""
        self.mean, self.variance, self.count = other.mean, other.variance, other.count

    def standardize(self, rewards: Tensor) -> Tensor:
        """(B, M) rewards in units of their standard deviation."""
        return (rewards - self.mean.to(rewards)) / self.std.to(rewards)


@dataclass(frozen=True)
class Advantages:
    """What the update learns from, over the trained steps K = len(steps)."""

    steps: Tensor
    """(K,) int64 rows of the transition table."""
    policy: Tensor
    """(K, B) combined, normalised and clipped."""
    targets: Tensor
    """(B, M) standardised value targets, clipped: the Monte-Carlo return, the same all along a trajectory."""
    raw: Tensor
    """(K, B, M) per head, before combination."""


@dataclass
class LagrangeMultipliers:
    """Weights of rewards with floors, by ascent on the dual of: maximise sum w R where E[R_m] >= floor_m.

    A multiplier grows while its reward's mean lies below the floor and falls to 0 above it (Tessler et al.,
    "Reward Constrained Policy Optimization", arXiv 1805.11074).
    """

    weights: Tensor
    """(M,) float64 weights for `critic_advantages`: fixed for objectives, multipliers for constraints."""
    floors: Tensor
    """(M,) float64 raw reward that each mean must reach; -inf for an objective."""
    learning_rate: float
    """Per update, in weight per raw reward."""
    maximum: float = 10.0
    """Bound of a multiplier, for a floor that cannot be reached."""

    def update(self, rewards: Tensor) -> None:
        """Take in rewards (B, M) of one rollout."""
        shortfall = self.floors - rewards.detach().double().cpu().mean(dim=0)
        moved = (self.weights + self.learning_rate * shortfall).clamp(0, self.maximum)
        self.weights = torch.where(self.floors.isneginf(), self.weights, moved)


def critic_advantages(
    rollout: Rollout,
    normalizer: RewardNormalizer,
    weights: Tensor,
    *,
    gamma: float,
    gae_lambda: float,
    advantage_clip: float,
    target_clip: float,
    combination: str = "sum_normalized",
    conditions: Sequence[RewardCondition] = (),
) -> Advantages:
    """Advantages from the critic's values, by `ops.normalized_advantages` over the trained steps.

    Args:
        rollout: with rewards.
        normalizer: already updated with this rollout's rewards.
        weights: (M,) of the rewards, in the order of rollout.rewards.
        gamma: discount.
        gae_lambda: of the policy's advantages; value targets use 1, so they are the rewards themselves.
        advantage_clip: bound of the result.
        target_clip: bound of the standardised value targets.
        combination: "sum_normalized", "sum", or "scalarized" for a critic with one head.
        conditions: easy rewards that count as 0 where a hard one fails.
    """
    rewards = stack_rewards(rollout)
    steps = torch.tensor(rollout.table.trainable_steps, device=rewards.device)
    values = rollout.values[steps].transpose(0, 1).to(rewards).contiguous()
    result = ops.normalized_advantages(
        rewards,
        values,
        normalizer.mean.to(rewards),
        normalizer.std.to(rewards),
        weights.to(rewards),
        combination=combination,
        conditions=conditions,
        gamma=gamma,
        gae_lambda=gae_lambda,
        advantage_clip=advantage_clip,
        target_clip=target_clip,
    )
    return Advantages(steps, result.advantages.T, result.targets[:, -1], result.raw.transpose(0, 1))


def group_advantages(
    rollout: Rollout, weights: Tensor, *, samples_per_prompt: int, advantage_clip: float
) -> Advantages:
    """Group-relative advantages (GRPO, arXiv 2402.03300): weighted reward against its group, at all steps.

        A_i = (R_i - mean(R of the prompt's group)) / std(R of the whole batch)

    Args:
        rollout: with rewards; consecutive `samples_per_prompt` trajectories share a prompt.
        weights: (M,) of the rewards.
        samples_per_prompt: size of a group; 1 takes the whole batch as the group.
        advantage_clip: bound of the result.
    """
    steps = torch.tensor(rollout.table.trainable_steps, device=rollout.latents.device)
    scores = (stack_rewards(rollout) * weights.to(rollout.latents)).sum(dim=-1)
    groups = scores.view(-1, samples_per_prompt) if samples_per_prompt > 1 else scores.view(1, -1)
    centred = (groups - groups.mean(dim=1, keepdim=True)).flatten()
    advantages = (centred / (scores.std() + _TINY)).clamp(-advantage_clip, advantage_clip)
    policy = advantages.expand(len(steps), -1)
    return Advantages(steps, policy, policy.new_zeros((rollout.batch_size, 0)), policy[..., None])


def stack_rewards(rollout: Rollout) -> Tensor:
    """(B, M) rewards in the order of rollout.rewards, on the rollout's device."""
    return torch.stack(list(rollout.rewards.values()), dim=1).to(rollout.latents.device, torch.float32)
