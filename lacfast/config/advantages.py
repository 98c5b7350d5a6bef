"""What the policy's advantages are made of: the baseline, and how several rewards become one number."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

from lacfast.config.checks import require

REGISTERED_BASELINES: dict[str, Callable[[Any], Any]] = {}
"""Estimator -> what it does to a rollout's values; lacfast.advantages.register_baseline adds to it."""
GROUP_ESTIMATORS = ("grpo", "leave_one_out")
"""Estimators that compare trajectories of one prompt within a rollout."""
ESTIMATORS = ("critic", *GROUP_ESTIMATORS, "ddpo", "batch_mean")
"""See AdvantageConfig.estimator."""
COMBINATIONS = ("sum_normalized", "sum", "scalarized", "conditional", "constrained")
"""See AdvantageConfig.combination."""
GROUP_STDS = ("global", "group", "none")
"""See AdvantageConfig.group_std."""
_BELONGS_TO = {
    "group_std": ("estimator", GROUP_ESTIMATORS),
    "buffer_size": ("estimator", ("ddpo",)),
    "min_count": ("estimator", ("ddpo",)),
    "conditions": ("combination", ("conditional",)),
    "floors": ("combination", ("constrained",)),
    "multiplier_learning_rate": ("combination", ("constrained",)),
    "multiplier_maximum": ("combination", ("constrained",)),
}
"""Setting -> which choices read it."""


@dataclass(frozen=True, kw_only=True)
class AdvantageConfig:
    """Baseline and combination of rewards; gamma, lambda and the bounds are PPOConfig's."""

    estimator: str = "critic"
    """"critic": GAE on the critic's values, the only one with credit per step; "grpo": against the
    group of the prompt (arXiv 2402.03300); "leave_one_out": against the others of the group (RLOO, arXiv
    2402.14740); "ddpo": against the prompt's last rewards (arXiv 2305.13301); "batch_mean": against the
    rollout. All but the first train without a critic. Or a name that lacfast.advantages.register_baseline was
    given: GAE on other values."""
    combination: str = "sum_normalized"
    """Of several rewards. "sum_normalized": advantages per reward, each in its own deviation, then the
    weighted sum; "sum": the weighted sum of a critic's advantages of standardised rewards as they are;
    "scalarized": one reward, the weighted sum of the raw ones, and one head; "conditional": "sum_normalized"
    where an easy reward counts only if a hard one passes, see `conditions`; "constrained": "sum_normalized"
    whose weights rise where a reward lies below its floor, see `floors`."""
    group_std: str = "global"
    """What a group's advantages are divided by: "global": the deviation of the rollout's rewards (flow_grpo);
    "group": of the group's own (DanceGRPO); "none": nothing (leave-one-out as published)."""
    buffer_size: int = 16
    """Rewards that "ddpo" keeps per prompt. ddpo-pytorch: 16."""
    min_count: int = 16
    """Rewards from which on "ddpo" compares with the prompt and not with the rollout. ddpo-pytorch: 16."""
    conditions: tuple[tuple[str, str, float], ...] = ()
    """(easy, hard, threshold): reward `easy` counts as 0 where reward `hard`, raw, is below the threshold."""
    floors: tuple[tuple[str, float], ...] = ()
    """(reward, raw mean that it must reach): a constraint; its weight is the first multiplier. The other
    rewards are the objective."""
    multiplier_learning_rate: float = 0.1
    """Per iteration, in weight per standard deviation that a mean lies below its floor."""
    multiplier_maximum: float = 10.0
    """Bound of a multiplier, for a floor that cannot be reached."""

    @property
    def uses_critic(self) -> bool:
        """Whether the baseline is the critic's value."""
        return self.estimator == "critic" or self.estimator in REGISTERED_BASELINES

    def __post_init__(self) -> None:
        # Tuples also when they come from a JSON file.
        for name in ("conditions", "floors"):
            object.__setattr__(self, name, tuple(tuple(entry) for entry in getattr(self, name)))
        estimators = (*ESTIMATORS, *REGISTERED_BASELINES)
        require(
            self.estimator in estimators,
            f"unknown estimator {self.estimator!r}; known: {', '.join(estimators)}. One that was registered "
            "is known after importing the module that registers it: bench.learning.controls has "
            "'shuffled_critic'",
        )
        for option, known in (("combination", COMBINATIONS), ("group_std", GROUP_STDS)):
            chosen = getattr(self, option)
            require(chosen in known, f"unknown {option} {chosen!r}; known: {', '.join(known)}")
        defaults = {field.name: field.default for field in fields(self)}
        for name, (option, readers) in _BELONGS_TO.items():
            value = getattr(self, name)
            require(
                value == defaults[name] or getattr(self, option) in readers,
                f"{name}={value!r} would be ignored by {option}={getattr(self, option)!r}; "
                f"only {', '.join(map(repr, readers))} reads it",
            )
        require(
            self.combination != "sum" or self.uses_critic,
            f"combination='sum' of {self.estimator!r} is what 'scalarized' gives; use that",
        )
        require(
            1 <= self.min_count <= self.buffer_size,
            f"min_count={self.min_count} must lie in [1, buffer_size={self.buffer_size}], or no prompt would "
            "ever have a baseline of its own",
        )
        require(
            self.combination != "conditional" or len(self.conditions) > 0,
            "combination='conditional' needs conditions=((easy, hard, threshold), ...)",
        )
        require(
            self.combination != "constrained" or len(self.floors) > 0,
            "combination='constrained' needs floors=((reward, raw mean), ...)",
        )
        require(all(math.isfinite(floor) for _, floor in self.floors), f"floors={self.floors} must be finite")
        for name in ("multiplier_learning_rate", "multiplier_maximum"):
            require(getattr(self, name) > 0, f"{name}={getattr(self, name)} must be > 0")
