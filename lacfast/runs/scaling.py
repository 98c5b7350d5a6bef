"""What several GPUs make of an iteration: a model on paper, of counted work and stated speeds."""

from __future__ import annotations

from dataclasses import dataclass

from lacfast.config import TrainConfig
from lacfast.runs.costs import Costs

RANK_FLOPS = 400e12
"""FLOPs per second that a rank is taken to do: about 40 % of an H100's dense bfloat16 peak."""
LINK_BYTES = 50e9
"""Bytes per second that a rank is taken to send: a 400 Gbit/s port per GPU."""


@dataclass(frozen=True)
class Scaling:
    """An iteration on so many ranks."""

    ranks: int
    flops: float
    """Work of the rank that has most."""
    optimizer_steps: int
    """Those of policy and critic; each sums its gradients over the ranks once."""
    gradient_bytes: float
    """Sent by each rank in all of these sums."""

    @property
    def efficiency(self) -> float:
        """Share of the time that is computation, 0 to 1, where no sum overlaps with it."""
        computing, sending = self.flops / RANK_FLOPS, self.gradient_bytes / LINK_BYTES
        return computing / (computing + sending)


def scaling(costs: Costs, config: TrainConfig, ranks: int) -> Scaling:
    """The model for `ranks` that share the batch of `config`, of the costs of one that has all of it.

    A ring sends of n bytes 2 n (N - 1) / N over N ranks (P. Patarasuk and X. Yuan, JPDC 69, 2009).
    """
    ppo, critic = config.ppo, config.critic
    policy_steps = ppo.num_minibatches * ppo.num_inner_epochs
    critic_steps = 0
    if costs.critic_parameters:
        own = ppo.critic_minibatches or ppo.num_minibatches
        critic_steps = (own if critic.keep_features else ppo.num_minibatches) * ppo.num_inner_epochs
    summed = policy_steps * costs.trained_parameters + critic_steps * costs.critic_parameters
    share = -(-config.batch_size // ranks) / config.batch_size
    sent = 2 * (ranks - 1) / ranks * 4 * summed
    return Scaling(ranks, costs.flops * share, policy_steps + critic_steps, sent)
