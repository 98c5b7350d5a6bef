"""How trajectories are made."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

from lacfast.config.checks import require
from lacfast.config.choice import Choice, require_choice
from lacfast.seeds import derived_seed

Steps = tuple[int, int]
"""From the first to before the second."""


@dataclass(frozen=True)
class Fixed(Choice):
    """The same stochastic steps in every iteration."""

    steps: Steps
    """(start, stop), 0 <= start <= stop <= num_steps."""

    def __post_init__(self) -> None:
        _require_steps("steps", self.steps)


@dataclass(frozen=True)
class Random(Choice):
    """Steps in a row at a place that is drawn for every iteration (Flow-GRPO-Fast)."""

    size: int
    """Stochastic steps of an iteration, >= 1. Flow-GRPO-Fast: 2."""
    within: Steps | None = None
    """(start, stop) that the places lie in. None: all but the last step."""

    def __post_init__(self) -> None:
        require(self.size >= 1, f"size={self.size} must be at least 1")
        _require_steps("within", self.within)


@dataclass(frozen=True)
class Sliding(Choice):
    """Steps in a row that move from noise to image and start over (MixGRPO, arXiv 2507.21802)."""

    size: int
    """Stochastic steps of an iteration, >= 1. MixGRPO: 4."""
    every: int
    """Iterations between two moves, >= 1. MixGRPO: 25."""
    stride: int = 1
    """Steps of a move, >= 1; the last place ends where `within` does. MixGRPO: 1."""
    within: Steps | None = None
    """(start, stop) that the places lie in. None: all but the last step."""

    def __post_init__(self) -> None:
        for name in ("size", "every", "stride"):
            require(getattr(self, name) >= 1, f"{name}={getattr(self, name)} must be at least 1")
        _require_steps("within", self.within)


def _require_steps(name: str, steps: Steps | None) -> None:
    is_pair = isinstance(steps, tuple) and len(steps) == 2
    require(
        steps is None or (is_pair and 0 <= steps[0] <= steps[1]),
        f"{name}={steps} must be (start, stop) with 0 <= start <= stop",
    )


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
    window: Fixed | Random | Sliding | None = None
    """Which steps are stochastic and trained; the others are ODE steps. None: all but the last, whose std is
    too small to train. Evaluation, steering and the rollouts that judge value pretraining take all steps
    that a moving window can reach."""
    guidance_scale: float = 1.0
    """Classifier-free guidance; 1 runs without the unconditional half, as the paper does."""

    def __post_init__(self) -> None:
        if self.window is not None:
            require_choice("window", self.window, Fixed | Random | Sliding)
        require(self.num_steps >= 1, f"num_steps={self.num_steps} must be at least 1")
        require(self.noise_level >= 0, f"noise_level={self.noise_level} must be >= 0")
        require(self.shift > 0, f"shift={self.shift} must be > 0")
        require(
            self.guidance_scale >= 1, f"guidance_scale={self.guidance_scale} must be >= 1 (1: no guidance)"
        )
        start, stop = self.stochastic_window
        require(
            stop <= self.num_steps,
            f"window={self.window} must lie within the {self.num_steps} steps of num_steps",
        )
        if isinstance(self.window, Random | Sliding):
            require(
                self.kind != "ode",
                f"window={self.window} moves stochastic steps, and kind='ode' has none; use 'flow_sde'",
            )
            require(
                self.window.size <= stop - start,
                f"window={self.window} must fit into the {stop - start} steps {(start, stop)} it moves in",
            )

    @property
    def stochastic_window(self) -> Steps:
        """(start, stop) of all steps that are ever stochastic; by default the last runs as ODE."""
        if isinstance(self.window, Fixed):
            return self.window.steps
        steps = None if self.window is None else self.window.within
        return (0, max(self.num_steps - 1, 1)) if steps is None else steps

    @property
    def moves(self) -> bool:
        """Whether iterations differ in their stochastic steps."""
        return isinstance(self.window, Random | Sliding)

    @property
    def places(self) -> tuple[SamplerConfig, ...]:
        """A sampler with a fixed window for every place that the window takes, in the order of the steps."""
        if not isinstance(self.window, Random | Sliding):
            return (self,)
        start, stop = self.stochastic_window
        size, stride = self.window.size, self.window.stride if isinstance(self.window, Sliding) else 1
        firsts = [*range(start, stop - size, stride), stop - size]
        return tuple(replace(self, window=Fixed((first, first + size))) for first in firsts)

    def at(self, iteration: int, *, seed: int) -> SamplerConfig:
        """The sampler of an iteration, whose window is fixed: a function of seed and iteration."""
        places = self.places
        if isinstance(self.window, Random):
            # Python promises that random() stays the same, of all its generators' methods.
            drawn = random.Random(derived_seed(seed, iteration)).random()
            return places[int(drawn * len(places))]
        return places[iteration // self.iterations_per_place % len(places)]

    @property
    def iterations_per_place(self) -> int:
        """Iterations between two moves of the window."""
        return self.window.every if isinstance(self.window, Sliding) else 1
