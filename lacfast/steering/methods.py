"""The methods of steering by name: run to the end, halved by their value, searched as beams, or weighted."""

from __future__ import annotations

import torch
from torch import Tensor

from lacfast.steering.cost import children, prune_steps
from lacfast.steering.method import Method
from lacfast.steering.particles import Particles, best_positions, gumbel_noise
from lacfast.steering.smc import SequentialMonteCarlo


class Halving(Method):
    """Pruning: the worse half is dropped at the prune steps."""

    def keep(self, particles: Particles, values: Tensor, step: int) -> Tensor | None:
        if step not in prune_steps(self.config, self.table):
            return None
        grouped = values.view(len(self.images), -1)
        return best_positions(grouped, max(grouped.shape[1] // 2, 1))

    def names(self, particles: Particles) -> Tensor:
        return particles.ids


class Beam(Method):
    """Every trajectory tries M children where a step draws noise; N survive by softmax(V / tau).

    With one beam this is SVDD (arXiv 2408.08252). The forward that values a child is the one that its next
    step needs, so a survivor costs nothing more.
    """

    def keep(self, particles: Particles, values: Tensor, step: int) -> Tensor | None:
        grouped = values.double().view(len(self.images), -1)
        if grouped.shape[1] == self.config.particles:
            return None
        if self.config.temperature > 0:
            noise = gumbel_noise(particles.noise, step).view_as(grouped)
            grouped = grouped / self.config.temperature + noise
        return best_positions(grouped, self.config.particles)

    def multiply(self, particles: Particles, step: int) -> Tensor | None:
        count = children(self.config, self.table, step)
        if count == 1:
            return None
        return torch.arange(len(particles), device=particles.rows.device).repeat_interleave(count)


METHODS: dict[str, type[Method]] = {
    "best_of_n": Method,
    "pruning": Halving,
    "beam": Beam,
    "smc": SequentialMonteCarlo,
}
"""SteeringConfig.method -> what decides for it."""
