"""Steering at inference by the trained critic: guidance by its gradient, and selection by its value."""

from lacfast.steering.cost import (
    FunctionEvaluations,
    ParticleStats,
    SteeringStats,
    planned_evaluations,
    trajectories_per_step,
)
from lacfast.steering.steer import steer

__all__ = [
    "FunctionEvaluations",
    "ParticleStats",
    "SteeringStats",
    "planned_evaluations",
    "steer",
    "trajectories_per_step",
]
