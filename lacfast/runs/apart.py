"""What ranks that sample apart make of an iteration: a model on paper, of counted work and stated speeds."""

from __future__ import annotations

from dataclasses import dataclass

from lacfast.config import TrainConfig
from lacfast.runs.costs import Costs
from lacfast.runs.scaling import LINK_BYTES, RANK_FLOPS, scaling

HOST_BYTES = 3e9
"""Bytes per second that are taken to go from one host to another: a port of 25 Gbit/s."""


@dataclass(frozen=True)
class Apart:
    """An iteration of ranks that learn and ranks that sample."""

    learners: int
    rollout_ranks: int
    staleness: int
    learning_seconds: float
    """Work of a rank that learns, with the sums of its gradients."""
    sampling_seconds: float
    """Work of a rank that samples."""
    rollout_bytes: int
    """Bytes of a rollout that the rank with most of it sends or gets."""
    weight_bytes: int
    """Bytes of what is trained, which each of them gets."""

    @property
    def sending_seconds(self) -> float:
        """Sending of the rank that sends or gets most."""
        return (self.rollout_bytes + self.weight_bytes) / HOST_BYTES

    @property
    def seconds(self) -> float:
        """An iteration: with staleness as long as the slowest part, without it as all in turn."""
        phases = self.learning_seconds, self.sampling_seconds, self.sending_seconds
        return max(phases) if self.staleness else sum(phases)

    @property
    def waiting(self) -> str:
        """Who waits for whom, and for how much of the time."""
        busy = {"learn": self.learning_seconds, "sample": self.sampling_seconds}
        shares = (f"those that {what} {1 - each / self.seconds:.0%}" for what, each in busy.items())
        return " and ".join(shares) + " of the time"


def apart(costs: Costs, config: TrainConfig, ranks: int, rollout_bytes: int) -> Apart:
    """The model for `ranks`, config.rollout_ranks of which sample, of the costs of one that does all.

    Args:
        costs: of an iteration.
        config: of the run.
        ranks: all of them.
        rollout_bytes: of a rollout on the rank that has most of it.
    """
    samplers = config.rollout_ranks
    learners = ranks - samplers
    sums = scaling(costs, config, learners)
    share = -(-config.batch_size // samplers) / config.batch_size
    # The critic of the time of learning values what others have sampled.
    sampled = costs.sampling_flops + costs.decode_flops
    learned = (costs.flops - sampled) * sums.flops / costs.flops
    return Apart(
        learners,
        samplers,
        config.staleness,
        learned / RANK_FLOPS + sums.gradient_bytes / LINK_BYTES,
        sampled * share / RANK_FLOPS,
        rollout_bytes,
        4 * costs.trained_parameters,
    )
