"""How trajectories of one image compete: run to the end, halved by their value, or searched as beams."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from lacfast.config import SteeringConfig
from lacfast.records import TransitionTable
from lacfast.steering.cost import ParticleStats, children, prune_steps
from lacfast.steering.particles import Particles, best_positions, gumbel_noise, slot_ids


class Selection(Protocol):
    """A method's decisions about the trajectories of G images."""

    def keep(self, particles: Particles, values: Tensor, step: int) -> Tensor | None:
        """Positions of the trajectories that go on from the state at `step`, None for all of them.

        Args:
            particles: in flight.
            values: (P,) V of their states.
            step: that they stand before.
        """

    def names(self, particles: Particles) -> Tensor:
        """Sample ids (P,) of the trajectories after a choice."""

    def multiply(self, particles: Particles, step: int) -> Tensor | None:
        """Positions of the parents of the trajectories that take the step, None for each its own."""

    def correct(self, log_ratio: Tensor) -> None:
        """Take note of log p / q (P,) of a step that guidance moved."""

    def finish(self, particles: Particles, scores: Tensor) -> Tensor:
        """Position (G,) of each image's chosen trajectory, by the scores (P,) of V or R."""

    def stats(self) -> ParticleStats | None:
        """What there is to tell besides."""


class Halving:
    """Best of n, with the worse half dropped at the prune steps if there are any."""

    def __init__(self, config: SteeringConfig, table: TransitionTable, images: Tensor) -> None:
        self.images = images
        self.prune_steps = prune_steps(config, table)

    def keep(self, particles: Particles, values: Tensor, step: int) -> Tensor | None:
        grouped = values.view(len(self.images), -1)
        if step not in self.prune_steps or grouped.shape[1] == 1:
            return None
        return best_positions(grouped, grouped.shape[1] // 2)

    def names(self, particles: Particles) -> Tensor:
        return particles.ids

    def multiply(self, particles: Particles, step: int) -> Tensor | None:
        return None

    def correct(self, log_ratio: Tensor) -> None:
        """Nothing is weighted here."""

    def finish(self, particles: Particles, scores: Tensor) -> Tensor:
        return best_positions(scores.view(len(self.images), -1), 1)

    def stats(self) -> ParticleStats | None:
        return None


class Beam(Halving):
    """Every trajectory tries M children where a step draws noise; N survive by softmax(V / tau).

    With one beam this is SVDD (arXiv 2408.08252). The forward that values a child is the one that its next
    step needs, so a survivor costs nothing more.
    """

    def __init__(self, config: SteeringConfig, table: TransitionTable, images: Tensor) -> None:
        super().__init__(config, table, images)
        self.config = config
        self.table = table

    def keep(self, particles: Particles, values: Tensor, step: int) -> Tensor | None:
        grouped = values.double().view(len(self.images), -1)
        if grouped.shape[1] == self.config.particles:
            return None
        if self.config.temperature > 0:
            noise = gumbel_noise(particles.ids, step, self.config.seed).view_as(grouped)
            grouped = grouped / self.config.temperature + noise
        return best_positions(grouped, self.config.particles)

    def multiply(self, particles: Particles, step: int) -> Tensor | None:
        count = children(self.config, self.table, step)
        if count == 1:
            return None
        return torch.arange(len(particles.ids), device=particles.ids.device).repeat_interleave(count)

    def names(self, particles: Particles) -> Tensor:
        return slot_ids(self.images, len(particles.ids) // len(self.images))
