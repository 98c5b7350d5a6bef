"""How trajectories of one image compete: run to the end, halved by their value, or searched as beams."""

from __future__ import annotations

import torch
from torch import Tensor

from lacfast.config import SteeringConfig
from lacfast.records import TransitionTable
from lacfast.steering.cost import ParticleStats, children, prune_steps
from lacfast.steering.particles import Particles, best_positions, gumbel_noise, slot_ids


class Selection:
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
        return slot_ids(self.images, len(particles.ids) // len(self.images))

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


class Halving(Selection):
    """Pruning: the worse half is dropped at the prune steps."""

    def keep(self, particles: Particles, values: Tensor, step: int) -> Tensor | None:
        if step not in prune_steps(self.config, self.table):
            return None
        grouped = values.view(len(self.images), -1)
        return best_positions(grouped, max(grouped.shape[1] // 2, 1))

    def names(self, particles: Particles) -> Tensor:
        return particles.ids


class Beam(Selection):
    """Every trajectory tries M children where a step draws noise; N survive by softmax(V / tau).

    With one beam this is SVDD (arXiv 2408.08252). The forward that values a child is the one that its next
    step needs, so a survivor costs nothing more.
    """

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
