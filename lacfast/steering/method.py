"""What a method of steering decides; by itself best of n, where all trajectories run to the end."""

from __future__ import annotations

from torch import Tensor

from lacfast.config import SteeringConfig
from lacfast.records import TransitionTable
from lacfast.steering.cost import ParticleStats
from lacfast.steering.particles import Particles, best_positions, slot_ids


class Method:
    """A method's decisions about the N trajectories of each of G images; by itself best of n."""

    def __init__(self, config: SteeringConfig, table: TransitionTable, images: Tensor) -> None:
        self.config = config
        self.table = table
        self.images = images

    def keep(self, particles: Particles, values: Tensor, step: int) -> Tensor | None:
        """Positions of the trajectories that go on from the state before `step`, by its V (P,); None: all."""
        return None

    def names(self, particles: Particles) -> Tensor:
        """Sample ids (P,) of the trajectories after a choice: those that share a past get new ones."""
        return slot_ids(self.images, len(particles) // len(self.images))

    def multiply(self, particles: Particles, step: int) -> Tensor | None:
        """Positions of the parents of the trajectories that take the step, None for each its own."""
        return None

    def correct(self, log_ratio: Tensor) -> None:
        """Take note of log p / q (P,) of a step that guidance moved; only weights need it."""

    def finish(self, particles: Particles, scores: Tensor) -> Tensor:
        """Position (G,) of each image's chosen trajectory, by the scores (P,) of V or R."""
        return best_positions(scores.view(len(self.images), -1), 1)

    def stats(self) -> ParticleStats | None:
        """What there is to tell besides."""
        return None
