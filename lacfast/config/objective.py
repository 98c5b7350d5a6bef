"""What the policy learns by: PPO on the transitions of a rollout, or a loss on clean latents noised anew."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from lacfast.config.checks import CountOrNone, NonNegative, Positive, Range, require
from lacfast.config.choice import Choice
from lacfast.config.sampling import Steps
from lacfast.config.unread import Unread

_Decay = Annotated[float, Range(least=0, below=1)]


@dataclass(frozen=True)
class PPO(Choice):
    """The clipped likelihood ratio of stochastic transitions (arXiv 1707.06347)."""

    def forward_steps(self, num_steps: int) -> tuple[int, ...] | None:
        """None: it learns from chains."""
        return None


@dataclass(frozen=True, kw_only=True)
class ForwardProcess(Choice):
    """What losses on the forward process have in common: trained steps, and an old policy.

    The old policy is an average of the policy's weights. After each iteration it becomes decay old +
    (1 - decay) policy, decay = min(old_decay, old_decay_rate max(steps - old_hold, 0)), with the optimizer
    steps so far.
    """

    UNREAD = (
        Unread(
            options=("old_decay_rate", "old_hold"),
            where=lambda objective: objective.old_decay == 0,
            because=lambda objective: ": old_decay=0 never rises",
            remedy="set old_decay",
        ),
    )
    samples_old: ClassVar[bool] = False
    """Whether the old policy makes the rollouts, or the policy does."""
    steps: Steps | None = None
    """(start, stop) of the sampler's steps whose noise levels clean latents get; 0 is the noisiest. None:
    all."""
    old_decay: _Decay = 0.5
    """Largest decay per iteration of the old policy; 0: it is the policy that the last iteration left."""
    old_decay_rate: NonNegative = 0.001
    """Rise of that decay per optimizer step."""
    old_hold: CountOrNone = 0
    """Optimizer steps before it rises from 0."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.steps is None or self.steps[0] < self.steps[1],
            f"steps={self.steps} must be (start, stop) with 0 <= start < stop, or there is none to train",
        )

    def forward_steps(self, num_steps: int) -> tuple[int, ...]:
        """Those of a sampler's steps whose states are trained."""
        return tuple(range(*(self.steps or (0, num_steps))))

    def decay(self, optimizer_steps: int) -> float:
        """The old policy's decay after so many optimizer steps of the run."""
        return min(self.old_decay, self.old_decay_rate * max(optimizer_steps - self.old_hold, 0))


@dataclass(frozen=True)
class NFT(ForwardProcess):
    """DiffusionNFT (arXiv 2509.16117): a policy mixed with the old one fits good images, one mixed with it
    the other way bad ones. The old policy samples. Defaults: its authors' for GenEval."""

    samples_old: ClassVar[bool] = True
    beta: Positive = 1.0
    """How far the policy is mixed with the old one, > 0. 1: not at all. Its authors: 0.1 for OCR and for
    several rewards."""


@dataclass(frozen=True, kw_only=True)
class AWM(ForwardProcess):
    """Advantage weighted matching (arXiv 2509.25050): the model's own pretraining loss times the advantage.
    Defaults: its authors' for GenEval, but all steps; theirs are 1..12 of 14."""

    old_decay: _Decay = 0.3
    power: Annotated[float, Range(above=0, most=1)] = 0.25
    """Exponent of the mean squared error in the loss; 1: the loss is linear in it."""
    old_weight: NonNegative = 1.0
    """Weight of the mean squared distance from the old policy's output."""


Objective = PPO | NFT | AWM
