"""A KL weight that follows the KL: PPO's adaptive penalty, on the KL to the reference model."""

from __future__ import annotations

import math
from dataclasses import dataclass

TOLERANCE = 1.5
"""The KL may lie this factor off its target. arXiv 1707.06347."""
FACTOR = 2.0
"""By which the weight moves when it does not. arXiv 1707.06347."""


@dataclass
class AdaptiveKL:
    """The weight beta of the KL in the policy's loss (arXiv 1707.06347, section 4).

        KL > 1.5 target:  beta <- 2 beta;      KL < target / 1.5:  beta <- beta / 2

    There the KL is that of one update; here it is the distance from the reference model, as in RLHF.
    """

    weight: float
    """beta > 0, now."""
    target: float
    """KL per element that the weight aims at, > 0, in the unit of PPOConfig.kl."""

    def update(self, kl: float) -> None:
        """Take in the KL of an iteration; one that is not finite says nothing."""
        if not math.isfinite(kl):
            return
        if kl > TOLERANCE * self.target:
            self.weight *= FACTOR
        elif kl < self.target / TOLERANCE:
            self.weight /= FACTOR
