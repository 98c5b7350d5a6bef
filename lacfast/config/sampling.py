"""How trajectories are made."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

from lacfast.config.checks import require

WINDOW_SCHEDULES = ("fixed", "random", "sliding")
"""Where the stochastic steps of an iteration lie; see SamplerConfig.window_schedule."""


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
    window_schedule: str = "fixed"
    """Of training rollouts. "fixed": all of `window` is stochastic, always; "random": window_size steps at a
    random place within it (Flow-GRPO-Fast); "sliding": window_size steps that move from noise to image
    (MixGRPO, arXiv 2507.21802) and start over. The other steps are ODE steps and are not trained. Evaluation,
    steering and the rollouts that judge value pretraining have all of `window` stochastic."""
    window_size: int = 0
    """Stochastic steps of an iteration, for "random" and "sliding"; MixGRPO: 4. 0: not used."""
    window_stride: int = 1
    """Steps by which "sliding" moves; the last place ends where `window` does. MixGRPO: 1."""
    window_interval: int = 1
    """Iterations between two moves of "sliding"; MixGRPO: 25."""
    guidance_scale: float = 1.0
    """Classifier-free guidance; 1 runs without the unconditional half, as the paper does."""

    def __post_init__(self) -> None:
        if self.window is not None:
            # A tuple also when it comes from a JSON file.
            object.__setattr__(self, "window", (self.window[0], self.window[1]))
        require(self.num_steps >= 1, f"num_steps={self.num_steps} must be at least 1")
        require(self.noise_level >= 0, f"noise_level={self.noise_level} must be >= 0")
        require(self.shift > 0, f"shift={self.shift} must be > 0")
        require(
            self.guidance_scale >= 1, f"guidance_scale={self.guidance_scale} must be >= 1 (1: no guidance)"
        )
        require(
            self.window_schedule in WINDOW_SCHEDULES,
            f"unknown window_schedule {self.window_schedule!r}; known: {', '.join(WINDOW_SCHEDULES)}",
        )
        self._check_moves()

    def _check_moves(self) -> None:
        if self.window_schedule != "sliding":
            for name in ("window_stride", "window_interval"):
                require(
                    getattr(self, name) == 1,
                    f"{name}={getattr(self, name)} would be ignored with "
                    f"window_schedule={self.window_schedule!r}; use 'sliding', or leave it out",
                )
        if not self.moves:
            require(
                self.window_size == 0,
                f"window_size={self.window_size} would be ignored: a fixed window is `window`; use "
                "window_schedule='random' or 'sliding', or leave it out",
            )
            return
        require(
            self.kind != "ode",
            f"window_schedule={self.window_schedule!r} moves stochastic steps, and kind='ode' has none; use "
            "'flow_sde'",
        )
        start, stop = self.stochastic_window
        require(
            1 <= self.window_size <= stop - start,
            f"window_size={self.window_size} of window_schedule={self.window_schedule!r} must be between 1 "
            f"and the {stop - start} steps of the window {(start, stop)} that it moves in",
        )
        for name in ("window_stride", "window_interval"):
            require(getattr(self, name) >= 1, f"{name}={getattr(self, name)} must be at least 1")

    @property
    def stochastic_window(self) -> tuple[int, int]:
        """The window with its default resolved: the last step runs as ODE."""
        return (0, max(self.num_steps - 1, 1)) if self.window is None else self.window

    @property
    def moves(self) -> bool:
        """Whether iterations differ in their stochastic steps."""
        return self.window_schedule != "fixed"

    @property
    def places(self) -> tuple[SamplerConfig, ...]:
        """A sampler with a fixed window for every place that the window takes, in the order of the steps."""
        if not self.moves:
            return (self,)
        start, stop = self.stochastic_window
        last = stop - self.window_size
        firsts = [*range(start, last, self.window_stride), last]
        return tuple(
            replace(
                self,
                window=(first, first + self.window_size),
                window_schedule="fixed",
                window_size=0,
                window_stride=1,
                window_interval=1,
            )
            for first in firsts
        )

    def at(self, iteration: int, *, seed: int) -> SamplerConfig:
        """The sampler of an iteration, whose window is fixed: a function of seed and iteration."""
        places = self.places
        if self.window_schedule == "random":
            # Python promises that random() stays the same, of all its generators' methods.
            drawn = random.Random(seed * 1_000_003 + iteration).random()
            return places[int(drawn * len(places))]
        return places[iteration // self.window_interval % len(places)]
