"""What steering cost and what it reached."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

BACKWARD_COST = 2
"""Forwards that a backward counts as: gradients of activations and the recomputed products."""


@dataclass(frozen=True)
class FunctionEvaluations:
    """NFE of a whole call: latents that went through the model, and gradients that came back."""

    forwards: int
    """Latents through the model, through its unconditional half and through a critic's copy of it."""
    backwards: int
    """Latents whose value gradient was taken."""
    images: int
    """Images that came of it."""

    @property
    def per_image(self) -> float:
        """(forwards + 2 backwards) / images"""
        return (self.forwards + BACKWARD_COST * self.backwards) / self.images


@dataclass(frozen=True)
class ParticleStats:
    """What sequential Monte Carlo did."""

    effective_sample_sizes: Tensor
    """(T, n) float64 effective particles at every state, before resampling; at most N."""
    resampled: Tensor
    """(T, n) bool"""
    log_weights: Tensor
    """(n, N) float64 of the particles at the end, after the final correction."""
    log_evidence: Tensor
    """(n,) float64 estimate of log E[exp(R / tau)] (of V without the final correction)."""


@dataclass(frozen=True)
class SteeringStats:
    """What steering cost, what the critic made of it and what the rewards did."""

    evaluations: FunctionEvaluations
    values: Tensor
    """(T, n) V of the chosen trajectory at every state; (0, n) without a critic."""
    rewards: dict[str, Tensor]
    """name -> (n,) raw reward of the chosen image; empty without rewards."""
    gold: dict[str, Tensor]
    """name -> (n,) of rewards that steering never saw."""
    reward_calls: int
    """Images that the rewards judged before the choice; 0 where V alone chose."""
    gradient_gain: float
    """Mean rise of V after a small move along its gradient, the sign test. NaN without guidance."""
    particles: ParticleStats | None = None
    """Of method "smc"."""
