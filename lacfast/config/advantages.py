"""What the policy's advantages are made of: the baseline, and how several rewards become one number."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from lacfast.config.checks import Config, Count, Finite, OneOf, Positive, require
from lacfast.config.choice import Choice, variants
from lacfast.config.unread import readers

GROUP_STDS = ("global", "group", "none")
"""See GroupBaseline.std."""


@dataclass(frozen=True)
class CriticValues(Choice, name="critic"):
    """GAE on the critic's values, the only estimator with credit per step (arXiv 1506.02438).

    A subclass takes other values, see lacfast.advantages.with_baseline.
    """


@dataclass(frozen=True)
class GroupBaseline(Choice):
    """What estimators have in common that compare the trajectories of one prompt within a rollout."""

    std: Annotated[str, OneOf(GROUP_STDS)] = "global"
    """What the distance from the group is divided by: "global": the deviation of the rollout's rewards
    (flow_grpo); "group": of the group's own (DanceGRPO); "none": nothing."""


@dataclass(frozen=True)
class GRPO(GroupBaseline):
    """A reward against those of its prompt in the rollout (arXiv 2402.03300)."""


@dataclass(frozen=True)
class LeaveOneOut(GroupBaseline):
    """A reward against the others of its prompt (RLOO, arXiv 2402.14740; std "none" there)."""


@dataclass(frozen=True)
class DDPO(Choice):
    """A reward against the last ones of its prompt (arXiv 2305.13301)."""

    buffer_size: Count = 16
    """Rewards that are kept per prompt. ddpo-pytorch: 16."""
    min_count: Count = 16
    """Rewards from which on a prompt has a baseline of its own, and not the rollout's. ddpo-pytorch: 16."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.min_count <= self.buffer_size,
            f"min_count={self.min_count} must lie in [1, buffer_size={self.buffer_size}], or no prompt would "
            "ever have a baseline of its own",
        )


@dataclass(frozen=True)
class BatchMean(Choice):
    """A reward against the rollout: REINFORCE with a constant baseline."""


Estimator = CriticValues | GRPO | LeaveOneOut | DDPO | BatchMean
ESTIMATORS = variants(Estimator)
"""Name -> choice of AdvantageConfig.estimator."""
COMBINATIONS = ("sum_normalized", "sum", "scalarized", "conditional", "constrained")
"""See AdvantageConfig.combination."""
_READERS = {
    "conditions": ("conditional",),
    "floors": ("constrained",),
    "multiplier_learning_rate": ("constrained",),
    "multiplier_maximum": ("constrained",),
}
"""Setting -> the combination that reads it."""


@dataclass(frozen=True, kw_only=True)
class AdvantageConfig(Config):
    """Baseline and combination of rewards; lambda and the bounds are PPOConfig's."""

    UNREAD = readers("combination", _READERS)

    estimator: Estimator = CriticValues()
    """What a trajectory is compared with. All but CriticValues train without a critic."""
    combination: Annotated[str, OneOf(COMBINATIONS)] = "sum_normalized"
    """How several rewards join. "sum_normalized": advantages per reward, each in its own deviation, then the
    weighted sum; "sum": the weighted sum of a critic's advantages of standardised rewards as they are;
    "scalarized": one reward, the weighted sum of the raw ones, and one head; "conditional": "sum_normalized"
    where an easy reward counts only if a hard one passes, see `conditions`; "constrained": "sum_normalized"
    whose weights rise where a reward lies below its floor, see `floors`."""
    conditions: tuple[tuple[str, str, Finite], ...] = ()
    """(easy, hard, threshold): reward `easy` counts as its running mean, 0 in standard deviations, where
    reward `hard`, raw, is below the threshold. A raw 0 is the best of a reward that is never above 0."""
    floors: tuple[tuple[str, Finite], ...] = ()
    """(reward, raw mean that it must reach): a constraint; its weight is the first multiplier. The other
    rewards are the objective."""
    multiplier_learning_rate: Positive = 0.1
    """Per iteration, in weight per standard deviation that a mean lies below its floor."""
    multiplier_maximum: Positive = 10.0
    """Bound of a multiplier, for a floor that cannot be reached."""

    @property
    def uses_critic(self) -> bool:
        """Whether the baseline is the critic's value, or one that takes its place."""
        return isinstance(self.estimator, CriticValues)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.combination != "sum" or self.uses_critic,
            f"combination='sum' of {self.estimator} is what 'scalarized' gives; use that",
        )
        require(
            self.combination != "conditional" or len(self.conditions) > 0,
            "combination='conditional' needs conditions=((easy, hard, threshold), ...)",
        )
        require(
            self.combination != "constrained" or len(self.floors) > 0,
            "combination='constrained' needs floors=((reward, raw mean), ...)",
        )
