"""What several GPUs make of an iteration: a model on paper, of counted work and stated speeds."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lacfast.config import TrainConfig
from lacfast.runs.costs import Costs
from lacfast.runs.shards import Divided, Shards

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
    """Optimizer steps of policy and critic; each sums its gradients over the ranks."""
    gradient_bytes: float
    """Sent by each rank in all of these sums."""
    gathers: int
    """Times that sharded weights are gathered, block by block."""
    gathered_bytes: float
    """Sent by each rank for it."""

    @property
    def efficiency(self) -> float:
        """Share of the time that is computation, 0 to 1, where nothing is sent meanwhile."""
        computing = self.flops / RANK_FLOPS
        return computing / (computing + (self.gradient_bytes + self.gathered_bytes) / LINK_BYTES)


def scaling(
    costs: Costs,
    config: TrainConfig,
    ranks: int,
    *,
    shards: Shards | None = None,
    microbatch: int = 1,
    num_steps: int = 1,
) -> Scaling:
    """The model for `ranks` that share the batch of `config`, of the costs of one that has all of it.

    A ring sends of n bytes 2 n (N - 1) / N over N ranks, and half of it where they are gathered, or summed
    into parts (P. Patarasuk and X. Yuan, JPDC 69, 2009).

    Args:
        costs: of all ranks together.
        config: of the run.
        ranks: N of them.
        shards: what config.shard of them divide. None: nothing.
        microbatch: pairs at a time.
        num_steps: denoising steps, whose states the critic learns from.
    """
    ppo, divided = config.ppo, shards or Shards()
    policy_steps = ppo.num_minibatches * ppo.num_inner_epochs
    critic_steps = 0
    states = config.batch_size * num_steps * ppo.num_inner_epochs
    if costs.critic_parameters:
        own = ppo.critic_minibatches or ppo.num_minibatches
        critic_steps = (own if config.critic.keep_features else ppo.num_minibatches) * ppo.num_inner_epochs
    if not config.critic.keep_features:
        states = costs.update_pairs
    policy = _Sent(divided, divided.model, policy_steps, costs.update_pairs, ranks, microbatch, config)
    critic = _Sent(divided, divided.critic, critic_steps, states, ranks, microbatch, config)
    # Guidance's half without a prompt, and the anchor, whose outputs are computed before several passes.
    uncond = config.sampler.guidance_scale > 1 and ppo.cfg_grad == "cond"
    extra = policy.microbatches * (ppo.kl is not None and not ppo.repeats)
    extra += (policy.microbatches - policy.known) * uncond + (ppo.kl is not None and ppo.repeats)
    share = -(-config.batch_size // ranks) / config.batch_size
    return Scaling(
        ranks=ranks,
        flops=costs.flops * share,
        optimizer_steps=policy_steps + critic_steps,
        gradient_bytes=policy.summed(costs.trained_parameters) + critic.summed(costs.critic_parameters),
        gathers=policy.gathers(extra) + critic.gathers(0),
        gathered_bytes=policy.gathered(extra) + critic.gathered(0),
    )


@dataclass(frozen=True)
class _Sent:
    """What the updates of policy or critic send."""

    shards: Shards
    module: Divided
    steps: int
    """Optimizer steps."""
    pairs: int
    """Pairs of all steps and ranks."""
    ranks: int
    microbatch: int
    config: TrainConfig

    @property
    def per_step(self) -> int:
        """Microbatches of an optimizer step."""
        if not self.steps:
            return 0
        return math.ceil(math.ceil(self.pairs / self.steps / self.ranks) / self.microbatch)

    @property
    def microbatches(self) -> int:
        """Microbatches of all steps."""
        return self.steps * self.per_step

    @property
    def known(self) -> int:
        """Microbatches whose half without a prompt is known from the rollout."""
        return max(self.per_step - 1, 0)

    def gathers(self, extra: int) -> int:
        """Gathers: one for the rollout, two for each microbatch, one for each of `extra` forwards."""
        return 1 + 2 * self.microbatches + extra if self.module.parts else 0

    def gathered(self, extra: int) -> float:
        """Bytes sent for it."""
        return self.gathers(extra) * self.module.gathered * (self.shards.count - 1) / self.shards.count

    def summed(self, parameters: int) -> float:
        """Bytes sent for gradients in float32: within groups, over them, and over all what stays whole."""
        count, replicas = self.shards.count, self.ranks // self.shards.count
        whole = 4 * parameters - self.module.gradient
        times = self.microbatches if self.config.shard_gradients else self.steps
        within = times * self.module.gradient * (count - 1) / count
        over = 2 * self.steps * self.module.gradient / count * (replicas - 1) / replicas
        return within + over + 2 * (self.ranks - 1) / self.ranks * self.steps * whole
