"""How trajectories are made."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import Annotated

from lacfast.config.checks import Config, Count, CountOrNone, NonNegative, OneOf, Positive, Range, require
from lacfast.config.choice import Choice
from lacfast.seeds import derived_seed

Steps = tuple[CountOrNone, CountOrNone]
"""(start, stop): the steps from the first to before the second."""


@dataclass(frozen=True)
class Fixed(Choice):
    """The same stochastic steps in every iteration."""

    steps: Steps
    """(start, stop), 0 <= start <= stop <= num_steps."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_rising("steps", self.steps)


@dataclass(frozen=True)
class Random(Choice):
    """Steps in a row at a place that is drawn for every iteration (Flow-GRPO-Fast)."""

    size: Count
    """Stochastic steps of an iteration. Flow-GRPO-Fast: 2."""
    within: Steps | None = None
    """(start, stop) that the places lie in. None: all but the last step."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_rising("within", self.within)


@dataclass(frozen=True)
class Sliding(Choice):
    """Steps in a row that move from noise to image and start over (MixGRPO, arXiv 2507.21802)."""

    size: Count
    """Stochastic steps of an iteration. MixGRPO: 4."""
    every: Count
    """Iterations between two moves. MixGRPO: 25."""
    stride: Count = 1
    """Steps of a move; the last place ends where `within` does. MixGRPO: 1."""
    within: Steps | None = None
    """(start, stop) that the places lie in. None: all but the last step."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_rising("within", self.within)


def _require_rising(name: str, steps: Steps | None) -> None:
    require(
        steps is None or steps[0] <= steps[1], f"{name}={steps} must be (start, stop) with 0 <= start <= stop"
    )


_ANY = Range(least=0)
_SHARE = Range(least=0, most=1)
SAMPLER_KINDS = {
    "flow_sde": _ANY,
    "dance_sde": _ANY,
    "cps": _SHARE,
    "flow_ddim": _SHARE,
    "ode": Range(least=0, most=0),
    "ddim": _SHARE,
    "ddpm": Range(least=1, most=1),
}
"""Sampler kind -> range of its noise level; lacfast.schedule makes their tables."""

_REMEDIES = {
    "ode": ": it draws no noise; explore with kind='flow_sde', or 'ddim'",
    "ddpm": ": the variance is the scheduler's; use kind='ddim' for another",
}


def require_noise_level(kind: str, noise_level: float) -> None:
    """
    Raises:
        ValueError: for a noise level out of the kind's range.
    """
    known = SAMPLER_KINDS[kind]
    remedy = _REMEDIES.get(kind, "")
    require(noise_level in known, f"noise_level={noise_level} of kind={kind!r} must {known}{remedy}")


@dataclass(frozen=True, kw_only=True)
class SamplerConfig(Config):
    """How trajectories are made."""

    kind: Annotated[str, OneOf(SAMPLER_KINDS, "sampler kind")] = "flow_sde"
    """Sampler kind, see lacfast.schedule. Source: Flow-GRPO."""
    num_steps: Count = 10
    """T, denoising steps. Flow-GRPO trains with 10."""
    noise_level: NonNegative = 0.7
    """eta of the kind, at most 1 for "cps", "flow_ddim" and "ddim", 0 for "ode". Flow-GRPO."""
    shift: Positive = 1.0
    """Timestep shift of uniform noise levels, which take the place of a flow's scheduler's; DanceGRPO: 3.
    1: the scheduler's own, uniform where there is none."""
    window: Fixed | Random | Sliding | None = None
    """Which steps are stochastic and trained; the others are ODE steps. None: all but the last, whose std is
    too small to train. Evaluation, steering and the rollouts that judge value pretraining take all steps
    that a moving window can reach."""
    guidance_scale: Annotated[float, Range(least=1)] = 1.0
    """Classifier-free guidance; 1 runs without the unconditional half, as the paper does."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_noise_level(self.kind, self.noise_level)
        require(
            self.window is None or (self.kind != "ode" and self.noise_level > 0),
            f"window={self.window} says which steps are stochastic, and kind={self.kind!r} with "
            f"noise_level={self.noise_level} has none; leave it out, or use 'flow_sde' with noise_level > 0",
        )
        start, stop = self.stochastic_window
        require(
            stop <= self.num_steps,
            f"window={self.window} must lie within the {self.num_steps} steps of num_steps",
        )
        if isinstance(self.window, Random | Sliding):
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
