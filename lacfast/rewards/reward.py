"""What a reward is, and how one fails."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from lacfast.runtime.failures import FailedError

Reward = Callable[[Tensor, list[str], list[dict[str, Any]]], Any]
"""(images (B, 3, H, W) float in [0, 1], prompts, metadata) -> (B,) tensor or array."""


@runtime_checkable
class Cancellable(Protocol):
    """A reward that waits for others, and can be told that nobody waits for it any more."""

    def cancel(self) -> None:
        """End the calls that other threads have in work; each raises."""


class RewardError(FailedError):
    """A reward failed or returned something that must not be learned from."""


class BadAnswerError(ValueError):
    """A server answered, but not with usable scores."""
