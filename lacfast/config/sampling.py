"""How trajectories are made."""

from __future__ import annotations

from dataclasses import dataclass

from lacfast.config.checks import require


@dataclass(frozen=True, kw_only=True)
class SamplerConfig:
    """How trajectories are made."""

    kind: str = "flow_sde"
    """Sampler kind, see lacfast.schedule. Source: Flow-GRPO."""
    num_steps: int = 10
    """T, denoising steps. Flow-GRPO trains with 10."""
    noise_level: float = 0.7
    """eta of the kind, >= 0. Flow-GRPO."""
    shift: float = 1.0
    """Timestep shift of the noise levels, > 0; 1 is uniform, SD3 uses 3."""
    window: tuple[int, int] | None = None
    """(start, stop) stochastic steps. None: all but the last, whose std is too small to train."""
    guidance_scale: float = 1.0
    """Classifier-free guidance; 1 runs without the unconditional half, as the paper does."""

    def __post_init__(self) -> None:
        require(self.num_steps >= 1, f"num_steps={self.num_steps} must be at least 1")
        require(self.noise_level >= 0, f"noise_level={self.noise_level} must be >= 0")
        require(self.shift > 0, f"shift={self.shift} must be > 0")
        require(
            self.guidance_scale >= 1, f"guidance_scale={self.guidance_scale} must be >= 1 (1: no guidance)"
        )

    @property
    def stochastic_window(self) -> tuple[int, int]:
        """The window with its default resolved: the last step runs as ODE."""
        return (0, max(self.num_steps - 1, 1)) if self.window is None else self.window
