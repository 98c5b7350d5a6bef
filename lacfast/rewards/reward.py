"""What a reward is, and how one fails."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

Reward = Callable[[Tensor, list[str], list[dict[str, Any]]], Any]
"""(images (B, 3, H, W) float in [0, 1], prompts, metadata) -> (B,) tensor or array."""


class RewardError(ValueError):
    """A reward failed or returned something that must not be learned from."""


class BadAnswerError(ValueError):
    """A server answered, but not with usable scores."""
