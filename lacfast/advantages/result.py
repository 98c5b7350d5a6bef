"""What the update learns from."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class Advantages:
    """What the update learns from, over the trained steps K = len(steps)."""

    steps: Tensor
    """(K,) int64 rows of the transition table."""
    policy: Tensor
    """(K, B) combined and clipped."""
    targets: Tensor
    """(B, H) standardised value targets, clipped: the Monte-Carlo return, the same all along a trajectory;
    H = 0 without a critic."""
    raw: Tensor
    """(K, B, H) per head, before combination."""
    metrics: dict[str, float] = field(default_factory=dict)
    """What the estimator counted."""
