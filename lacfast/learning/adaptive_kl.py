"""A KL weight that follows the KL to the anchor, by the rule of RLHF."""

from __future__ import annotations

import math

GAIN = 0.1
"""K_beta, how fast the weight moves. arXiv 1909.08593."""
LARGEST_ERROR = 0.2
"""Bound of the proportional error, so that at a KL of 0, as at the start, the weight falls by 2 %."""


def adapted_weight(weight: float, kl: float, target: float) -> float:
    """The weight beta of the KL in the policy's loss after an iteration (arXiv 1909.08593, section 2.2).

        e = clip(KL / target - 1, -0.2, 0.2);   beta <- beta (1 + 0.1 e)

    Args:
        weight: beta > 0, until now.
        kl: of the iteration, per element; one that is not finite says nothing.
        target: that the weight aims at, > 0, in the unit of KLPenalty.kind.
    """
    if not math.isfinite(kl):
        return weight
    error = min(max(kl / target - 1, -LARGEST_ERROR), LARGEST_ERROR)
    return weight * (1 + GAIN * error)
