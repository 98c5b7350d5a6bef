"""Steering at inference by the trained critic: guidance by its gradient, and selection by its value."""

from lacfast.steering.cost import planned_evaluations, trajectories_per_step
from lacfast.steering.entry import steer
from lacfast.steering.stats import FunctionEvaluations, ParticleStats, SteeringStats

__all__ = [
    "FunctionEvaluations",
    "ParticleStats",
    "SteeringStats",
    "planned_evaluations",
    "steer",
    "trajectories_per_step",
]
