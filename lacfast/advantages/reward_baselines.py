"""Advantages without a critic: a trajectory's reward against other rewards, the same at all of its steps."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from lacfast.advantages.prompt_statistics import PromptStatistics

GROUP_EPSILON = 1e-4
"""Added to a group's deviation, as flow_grpo does: rewards that differ by rounding are no signal."""
BATCH_EPSILON = 1e-8
"""Added to a rollout's deviation, as ddpo-pytorch does."""


def group_advantages(
    rewards: Tensor, *, samples_per_prompt: int, std: str = "global", leave_one_out: bool = False
) -> Tensor:
    """Rewards against those of their own prompt in this rollout.

        A_i = (R_i - mean(R of the group)) / (std + 1e-4)                        GRPO, arXiv 2402.03300, 4.1
        A_i =  R_i - mean(R of the others in the group), over std + 1e-4         RLOO, arXiv 2402.14740, 4
        std: of the population of all rewards ("global"), of the group's ("group"), or no division

    Args:
        rewards: (B, M); consecutive `samples_per_prompt` trajectories share a prompt.
        samples_per_prompt: n, size of a group, at least 2.
        std: "global", "group" or "none".
        leave_one_out: compare with the others only; n / (n - 1) times the distance from the group's mean.

    Returns:
        (B, M) in the rewards' dtype.
    """
    groups = rewards.double().reshape(-1, samples_per_prompt, rewards.shape[1])
    centred = groups - groups.mean(dim=1, keepdim=True)
    if leave_one_out:
        centred = centred * (samples_per_prompt / (samples_per_prompt - 1))
    if std == "global":
        centred = centred / (rewards.double().var(dim=0, correction=0).sqrt() + GROUP_EPSILON)
    elif std == "group":
        centred = centred / (groups.std(dim=1, correction=0, keepdim=True) + GROUP_EPSILON)
    return centred.flatten(0, 1).to(rewards)


def zero_std_groups(rewards: Tensor, samples_per_prompt: int) -> int:
    """Groups whose rewards (B, M) are all equal: they teach nothing."""
    groups = rewards.reshape(-1, samples_per_prompt, rewards.shape[1])
    return int((groups == groups[:, :1]).all(dim=2).all(dim=1).sum())


def batch_advantages(rewards: Tensor) -> Tensor:
    """Rewards against the whole rollout: A_i = (R_i - mean(R)) / (std(R) + 1e-8).

    REINFORCE with a constant baseline, DDPO (arXiv 2305.13301) without statistics per prompt.

    Args:
        rewards: (B, M)

    Returns:
        (B, M) in the rewards' dtype.
    """
    wide = rewards.double()
    std = wide.var(dim=0, correction=0).sqrt()
    return ((wide - wide.mean(dim=0)) / (std + BATCH_EPSILON)).to(rewards)


def prompt_advantages(
    rewards: Tensor, prompts: Sequence[str], statistics: Sequence[PromptStatistics]
) -> Tensor:
    """Rewards against the last ones of their prompt; DDPO, arXiv 2305.13301, appendix.

        A_i = (R_i - mean(kept rewards of the prompt)) / (their std + 1e-6)

    Args:
        rewards: (B, M); taken into the statistics.
        prompts: (B,)
        statistics: one for each head.

    Returns:
        (B, M) in the rewards' dtype.
    """
    scores = rewards.double().cpu().numpy()
    relative = [kept.update(list(prompts), scores[:, head]) for head, kept in enumerate(statistics)]
    return torch.from_numpy(np.stack(relative, axis=1)).to(rewards)


def combined(advantages: Tensor, weights: Tensor) -> Tensor:
    """(B,) of advantages (B, M): sum_m w_m A_m / sum_m |w_m|, so that one reward's weight does not matter."""
    like = weights.to(advantages)
    total = like.abs().sum()
    return (advantages * like).sum(dim=1) / torch.where(total > 0, total, torch.ones_like(total))
