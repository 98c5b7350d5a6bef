"""What a reward is, and how one fails."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeVar, runtime_checkable

from torch import Tensor

from lacfast.runtime.failures import FailedError

Reward = Callable[[Tensor, list[str], list[dict[str, Any]]], Any]
"""(images (B, 3, H, W) float in [0, 1], prompts, metadata) -> (B,) tensor or array."""


@runtime_checkable
class Cancellable(Protocol):
    """A reward that waits for others, and can be told that nobody waits for it any more."""

    def cancel(self) -> None:
        """End the calls that other threads have in work; each raises."""


@runtime_checkable
class Checkable(Protocol):
    """A reward that needs something that may be missing: a server, files of a model."""

    def check(self) -> None:
        """Ask for it, in seconds; raises when it is not there."""


@runtime_checkable
class Loadable(Protocol):
    """A reward that loads something before it can judge."""

    def prepare(self) -> None:
        """Load it now; raises when that cannot be done."""


TIME_LIMIT_S = 1800.0
"""Seconds for one batch of a reward without an attribute `time_limit_s`, which is math.inf where a reward
gives up by itself."""
Judged = Callable[[str, dict[str, Any]], object]
"""(prompt, its metadata); raises ValueError where a reward finds there nothing to judge an image by."""
RewardFunction = TypeVar("RewardFunction", bound=Callable[..., Any])


def needs(check: Judged) -> Callable[[RewardFunction], RewardFunction]:
    """Decorator of a reward that needs more of a prompt than its text.

    `check` becomes its attribute `check_prompt`, which RewardSet.require_prompts asks before any work; a
    class of rewards defines a method of that name instead.
    """

    def marked(reward: RewardFunction) -> RewardFunction:
        reward.check_prompt = check  # type: ignore[attr-defined]
        return reward

    return marked


class RewardError(FailedError):
    """A reward failed or returned something that must not be learned from."""


class NotFiniteError(RewardError):
    """Images are NaN or infinite, so that no reward was asked: a run that goes on would make them again."""


class BadAnswerError(ValueError):
    """A server answered, but not with usable scores."""
