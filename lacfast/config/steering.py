"""Steering at inference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from lacfast.config.checks import (
    Config,
    Count,
    CountOrNone,
    NonNegative,
    OneOf,
    Range,
    Seed,
    Share,
    require,
)
from lacfast.config.unread import Unread, readers

STEERING_METHODS = ("best_of_n", "pruning", "smc", "beam")
"""How trajectories of one image compete; see SteeringConfig.method."""
GUIDANCE_FORMS = ("relative", "score", "constant", "mean_shift")
"""How far a step moves along the value gradient; see SteeringConfig.guidance_form."""
_READERS = {
    "prune_fractions": ("pruning",),
    "candidates": ("beam",),
    "temperature": ("smc", "beam"),
    "annealing": ("smc",),
    "ess_threshold": ("smc",),
    "final_choice": ("smc",),
}
"""Setting -> the methods that read it."""


@dataclass(frozen=True, kw_only=True)
class SteeringConfig(Config):
    """Steering of sampling by the critic at inference.

    V is the weighted sum of the critic's heads in standard deviations of the rewards. A method says how the
    trajectories of one image compete; guidance moves each of them besides, where guidance_weight > 0.
    """

    UNREAD = (
        *readers("method", _READERS),
        Unread(
            options=("guidance_form", "guidance_window"),
            where=lambda steering: not steering.guided,
            because=lambda steering: ": guidance_weight=0 takes no gradient",
        ),
    )

    method: Annotated[str, OneOf(STEERING_METHODS)] = "pruning"
    """"best_of_n": all run to the end; "pruning": the worse half is dropped at prune_fractions; "smc":
    resampled to exp(V / temperature); "beam": every trajectory tries `candidates` at each step."""
    particles: Count = 4
    """N, trajectories per image: at the start of pruning (a power of two), of smc, beams that are kept.
    1 without guidance is plain sampling."""
    prune_fractions: tuple[Annotated[float, Range(above=0, below=1)], ...] = (0.5, 0.75)
    """Steps at which pruning halves the trajectories, as fractions of all."""
    candidates: Count = 4
    """M of beam, children of each kept trajectory; one survives per beam (SVDD, arXiv 2408.08252)."""
    temperature: NonNegative = 0.5
    """tau of smc and beam, in standard deviations of the reward; 0 lets beam keep the best, always."""
    annealing: NonNegative = 1.0
    """Exponent of smc: the potential at step k of T is (k / T)^annealing V; 0 trusts V at once."""
    ess_threshold: Share = 0.5
    """Share of effective particles below which smc resamples (Doucet and Johansen 2009: 1/2)."""
    selection: Annotated[str, OneOf(("value", "reward"))] = "value"
    """What chooses among the trajectories that reach the end: "value", V of the last noisy state, or
    "reward", which scores them all. smc then aims at exp(R / temperature)."""
    final_choice: Annotated[str, OneOf(("draw", "best"))] = "draw"
    """How smc ends: one image is drawn by weight, "draw", or that of highest V or R is taken, "best"."""
    guidance_weight: NonNegative = 0.0
    """w, 0: no gradient. A fraction for "relative", else per unit of V; 1/tau aims at exp(V / tau)."""
    guidance_form: Annotated[str, OneOf(GUIDANCE_FORMS)] = "relative"
    """"relative": w times the length of the step's own drift; "score": the score becomes score + w grad V
    (the DDIM and flow forms); "constant": model output +- w grad V (arXiv 2605.27736); "mean_shift":
    mean + w std^2 grad V, which moves stochastic steps only."""
    guidance_window: tuple[Share, Share] = (0.2, 0.9)
    """Noise levels between which the gradient is used, where the critic explains something."""
    head_combination: Annotated[str, OneOf(("sum", "minimum"))] = "sum"
    """"sum" of the weighted heads, or the "minimum" of them: for heads that judge the same thing."""
    batch_size: Count = 256
    """Latents per call of the model; as many images are in flight as fit, at least one."""
    seed: Seed = 0
    """Seed of the noise, which is no noise of a training under the same seed."""
    first_image: CountOrNone = 0
    """Number of the call's first image: a call with the same seed and number repeats, one that goes on behind
    n images takes n."""

    def __post_init__(self) -> None:
        super().__post_init__()
        low, high = self.guidance_window
        require(low < high, f"guidance_window={self.guidance_window} must satisfy 0 <= low < high <= 1")
        self._check_method()

    def _check_method(self) -> None:
        if self.method == "pruning":
            require(
                self.particles & (self.particles - 1) == 0,
                f"particles={self.particles} must be a power of two to be pruned by halves",
            )
        require(
            self.method != "smc" or self.temperature > 0,
            "temperature=0 leaves smc no target exp(V / temperature); use temperature > 0 or method='beam'",
        )

    @property
    def guided(self) -> bool:
        return self.guidance_weight > 0

    @property
    def width(self) -> int:
        """Most trajectories of one image that are in flight together."""
        return self.particles * (self.candidates if self.method == "beam" else 1)
