"""From rewards to advantages: standardisation, GAE per reward head, combination of heads, group baselines."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lacfast import ops
from lacfast.records import Rollout

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


def critic_advantages(
    rollout: Rollout,
    normalizer: RewardNormalizer,
    weights: Tensor,
    *,
    gamma: float,
    gae_lambda: float,
    advantage_clip: float,
    target_clip: float,
) -> Advantages:
    """Advantages from the critic's values: GAE per head, then a weighted sum, each head in its own deviation.

        A = sum_m w_m A_m / std(A_m), then normalised over all samples and steps and clipped

    Args:
        rollout: with rewards.
        normalizer: already updated with this rollout's rewards.
        weights: (M,) of the rewards, in the order of rollout.rewards.
        gamma: discount.
        gae_lambda: of the policy's advantages; value targets use 1, so they are the rewards themselves.
        advantage_clip: bound of the result.
        target_clip: bound of the standardised value targets.
    """
    steps = torch.tensor(rollout.table.trainable_steps, device=rollout.values.device)
    final = normalizer.standardize(stack_rewards(rollout))
    values = rollout.values[steps].transpose(0, 1).contiguous()
    rewards = torch.zeros_like(values)
    rewards[:, -1] = final
    raw = ops.gae(rewards, values, gamma=gamma, gae_lambda=gae_lambda)[0].transpose(0, 1)
    combined = (weights.to(raw) * raw / (raw.std(dim=(0, 1)) + _TINY)).sum(dim=-1)
    return Advantages(
        steps, _normalized(combined, advantage_clip), final.clamp(-target_clip, target_clip), raw
    )


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


def _normalized(advantages: Tensor, bound: float) -> Tensor:
    return ((advantages - advantages.mean()) / (advantages.std() + _TINY)).clamp(-bound, bound)
