"""Steering at inference."""

from __future__ import annotations

from dataclasses import dataclass

from lacfast.config.checks import require


@dataclass(frozen=True, kw_only=True)
class SteeringConfig:
    """Steering of sampling by the critic at inference."""

    particles: int = 4
    """Trajectories per image at the start, a power of two; 1 does not prune."""
    prune_fractions: tuple[float, ...] = (0.5, 0.75)
    """When to halve the particles, as fractions of the steps."""
    guidance_weight: float = 0.0
    """Length of the move along the value gradient, as a fraction of the model output's; 0: no gradient."""
    guidance_window: tuple[float, float] = (0.2, 0.9)
    """Noise levels between which the gradient is used."""
    batch_size: int = 256
    """Images per batch."""
    seed: int = 0
    """Of the noise."""

    def __post_init__(self) -> None:
        require(
            self.particles >= 1 and self.particles & (self.particles - 1) == 0,
            f"particles={self.particles} must be a power of two",
        )
        require(
            self.guidance_weight >= 0, f"guidance_weight={self.guidance_weight} must be >= 0 (0: no guidance)"
        )
        low, high = self.guidance_window
        require(
            0 <= low < high <= 1, f"guidance_window={self.guidance_window} must satisfy 0 <= low < high <= 1"
        )
