"""A KL weight that follows the KL: PPO's adaptive penalty, on the KL to the anchor."""

from __future__ import annotations

import math

TOLERANCE = 1.5
"""The KL may lie this factor off its target. arXiv 1707.06347."""
FACTOR = 2.0
"""Factor by which the weight moves when it does not. arXiv 1707.06347."""


def adapted_weight(weight: float, kl: float, target: float) -> float:
    """The weight beta of the KL in the policy's loss after an iteration (arXiv 1707.06347, section 4).

        KL > 1.5 target:  beta <- 2 beta;      KL < target / 1.5:  beta <- beta / 2

    There the KL is that of one update; here it is the distance from the anchor, as in RLHF.

    Args:
        weight: beta > 0, until now.
        kl: of the iteration, per element; one that is not finite says nothing.
        target: that the weight aims at, > 0, in the unit of PPOConfig.kl.
    """
    if not math.isfinite(kl):
        return weight
    if kl > TOLERANCE * target:
        return weight * FACTOR
    return weight / FACTOR if kl < target / TOLERANCE else weight
