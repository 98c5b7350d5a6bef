"""Sequential Monte Carlo with the critic as potential: particles that follow p(x) exp(V / tau).

Feynman-Kac steering: at state k of T the potential is U_k = lam_k V_k / tau, lam_k = (k / T)^annealing, and
    log w_k = log w_{k-1} + U_k - U_{k-1} + log p / q,      log w_T += R / tau - U_{T-1}
with the proposal's ratio where guidance moved the step (arXiv 2306.17775). Along a path the differences
telescope to R / tau whatever V is, so the critic decides how good the estimate is, never what it estimates.
Systematic resampling where the effective particles fall below a share of N.
Sources: Del Moral 2004; Singhal et al., arXiv 2501.06848.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lacfast import ops
from lacfast.config import SteeringConfig
from lacfast.records import NoiseKey, TransitionTable
from lacfast.steering.cost import ParticleStats
from lacfast.steering.method import Method
from lacfast.steering.particles import SLOT_STRIDE, Particles, best_positions, gumbel_noise


class SequentialMonteCarlo(Method):
    """Weights of N particles of each of G images, float64, and what became of them."""

    def __init__(self, config: SteeringConfig, table: TransitionTable, images: Tensor) -> None:
        super().__init__(config, table, images)
        self.last_stochastic_step = max(table.trainable_steps)
        shape = (len(images), config.particles)
        self.log_weights = torch.zeros(shape, dtype=torch.float64, device=images.device)
        self.potential = torch.zeros_like(self.log_weights)
        self.log_evidence = self.log_weights.new_zeros(len(images))
        self.sizes: list[Tensor] = []
        self.resampled: list[Tensor] = []

    def keep(self, particles: Particles, values: Tensor, step: int) -> Tensor | None:
        share = (step / self.table.num_steps) ** self.config.annealing
        self._move_potential(share * values.double().view_as(self.log_weights) / self.config.temperature)
        sizes = ops.effective_sample_size(self.log_weights)
        # Copies that no later noise parts would stay copies.
        is_useful = step <= self.last_stochastic_step
        due = (sizes < self.config.ess_threshold * self.config.particles) & is_useful
        self.sizes.append(sizes)
        self.resampled.append(due)
        return self._resample(due, step, particles.noise.seed) if is_useful else None

    def correct(self, log_ratio: Tensor) -> None:
        self.log_weights = self.log_weights + log_ratio.view_as(self.log_weights)

    def finish(self, particles: Particles, scores: Tensor) -> Tensor:
        grouped = scores.double().view_as(self.log_weights)
        self._move_potential(grouped / self.config.temperature)
        self.log_evidence = self.log_evidence + self._log_mean_weight()
        if self.config.final_choice == "best":
            return best_positions(grouped, 1)
        noise = gumbel_noise(particles.noise, self.table.num_steps)
        return best_positions(self.log_weights + noise.view_as(grouped), 1)

    def stats(self) -> ParticleStats | None:
        return ParticleStats(
            torch.stack(self.sizes), torch.stack(self.resampled), self.log_weights, self.log_evidence
        )

    def _move_potential(self, potential: Tensor) -> None:
        self.log_weights = self.log_weights + potential - self.potential
        self.potential = potential

    def _log_mean_weight(self) -> Tensor:
        return self.log_weights.logsumexp(dim=1) - math.log(self.config.particles)

    def _resample(self, due: Tensor, step: int, seed: Tensor) -> Tensor:
        """Positions (P,) of the ancestors; the mean weight of a resampled image goes to its evidence."""
        steps = torch.full_like(self.images, step)
        # A trajectory that is not there: its noise is no particle's.
        unused = self.images + self.config.particles * SLOT_STRIDE
        drawn = ops.systematic_resample(self.log_weights.contiguous(), steps, NoiseKey(seed, unused))
        own = torch.arange(self.config.particles, device=drawn.device)
        ancestors = torch.where(due[:, None], drawn, own)
        self.log_evidence = self.log_evidence + torch.where(due, self._log_mean_weight(), 0.0)
        self.log_weights = torch.where(due[:, None], 0.0, self.log_weights)
        self.potential = self.potential.gather(1, ancestors)
        offsets = torch.arange(len(due), device=due.device)[:, None] * self.config.particles
        return (ancestors + offsets).flatten()
