"""What a reward is, what it says of itself before it is asked, and how one fails."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Protocol, TypeVar, runtime_checkable

from lacfast.config.checks import Config, OneOf, require
from lacfast.runtime.failures import FailedError

Reward = Callable[..., Any]
"""(images (B, 3, H, W) float in [0, 1], prompts, metadata) -> (B,) numbers, alone or with a dict of notes;
of a video a few frames are such images, and their mean is its score;
what else it may take and return its Declaration says."""


@dataclass(frozen=True, kw_only=True)
class Declaration(Config):
    """What a reward takes and returns beyond the rule: its attribute `declaration`, read before a run."""

    heads: tuple[str, ...] = ()
    """Names of the scores in the dict name -> (B,) that it returns, no other names: each has a head of the
    critic. Empty: it returns one score per image, under the reward's own name."""
    weights: tuple[float, ...] = ()
    """Weight of each of `heads` in the sum, times that of the reward; 0 for one that is only reported. Empty:
    1 each."""
    images: Annotated[str, OneOf(("tensor", "pil"))] = "tensor"
    """"tensor": (B, 3, H, W) float in [0, 1] on the device where they were made; "pil": a list of B RGB
    images of Pillow."""
    video: bool = False
    """It judges whole videos: (B, F, 3, H, W), or B lists of F images of Pillow, and no pictures. False: of a
    video it is given PipelineSettings.judged_frames frames as images, and its score is their mean."""
    reference: str = ""
    """Key of the metadata under which every prompt has a picture to compare with: a path, an image of Pillow,
    or (3, H, W) in [0, 1]. The reward is given them as `references`, a list in the form of `images`, each of
    its own size. Empty: there is none, and no such argument."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            len(set(self.heads)) == len(self.heads) and all(self.heads),
            f"heads={self.heads} must be different names; give each score one",
        )
        require(
            len(self.weights) in (0, len(self.heads)),
            f"weights={self.weights} do not fit heads={self.heads}; give one weight for each head, or none",
        )

    @staticmethod
    def of(reward: object) -> Declaration:
        """What a reward, or a class of rewards, declares; the rule where it declares nothing.

        Raises:
            ValueError: for an attribute that is no Declaration.
        """
        found = getattr(reward, "declaration", _RULE)
        if not isinstance(found, Declaration):
            raise ValueError(
                f"the reward's declaration={found!r} is a {type(found).__name__}; "
                "set it to lacfast.rewards.reward.Declaration(...)"
            )
        return found

    def head_weights(self, name: str) -> dict[str, float]:
        """Head -> weight of a reward of that name."""
        if not self.heads:
            return {name: 1.0}
        return dict(zip(self.heads, self.weights or [1.0] * len(self.heads), strict=True))


_RULE = Declaration()


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


def declares(
    *,
    heads: tuple[str, ...] = (),
    weights: tuple[float, ...] = (),
    images: str = "tensor",
    video: bool = False,
    reference: str = "",
) -> Callable[[RewardFunction], RewardFunction]:
    """Decorator that gives a function a Declaration; a class of rewards has it as an attribute instead."""
    declaration = Declaration(heads=heads, weights=weights, images=images, video=video, reference=reference)

    def marked(reward: RewardFunction) -> RewardFunction:
        reward.declaration = declaration  # type: ignore[attr-defined]
        return reward

    return marked


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
