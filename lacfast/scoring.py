"""Rewards by name or as callables: lookup, call, and a check of the scores before they are learned from."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lacfast.protocols import Reward

REGISTERED: dict[str, str] = {
    "shapes": "lacfast.tasks.shapes:shapes_reward",
    "shapes_strict": "lacfast.tasks.shapes:shapes_strict",
    "shapes_partial": "lacfast.tasks.shapes:shapes_partial",
    "shapes_gold": "lacfast.tasks.shapes:shapes_gold",
}
"""Reward name -> "module:callable", imported at first use."""

RewardSpec = str | Reward | Sequence[str | Reward] | Mapping[str | Reward, float]
"""One reward, several of equal weight, or reward -> weight; each a registered name or a callable."""


class RewardError(ValueError):
    """A reward failed or returned something that must not be learned from."""


@dataclass(frozen=True)
class RewardSet:
    """Named rewards with weights."""

    functions: dict[str, Reward]
    weights: Tensor
    """(M,) float32, in the order of `functions`."""

    @staticmethod
    def create(spec: RewardSpec) -> RewardSet:
        """Resolve names and callables.

        Raises:
            ValueError: for an unknown name (the known are listed), two rewards of one name, or no reward.
        """
        weighted: Mapping[str | Reward, float]
        if isinstance(spec, Mapping):
            weighted = spec
        elif isinstance(spec, str) or callable(spec):
            weighted = {spec: 1.0}
        else:
            weighted = dict.fromkeys(spec, 1.0)
        if not weighted:
            raise ValueError(
                f"there is no reward to train on; pass a callable or one of: {', '.join(REGISTERED)}"
            )
        functions = dict(_named(entry) for entry in weighted)
        if len(functions) != len(weighted):
            raise ValueError(
                f"two rewards share a name: {[_named(entry)[0] for entry in weighted]}; "
                "wrap one in a function of another name"
            )
        return RewardSet(functions, torch.tensor(list(weighted.values()), dtype=torch.float32))

    @property
    def names(self) -> list[str]:
        return list(self.functions)

    def score(self, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> dict[str, Tensor]:
        """name -> (B,) float32 on the CPU.

        Raises:
            RewardError: when a reward raises, returns another length or a value that is not finite.
        """
        return {
            name: _checked(name, function, images, prompts, metadata)
            for name, function in self.functions.items()
        }


def _named(entry: str | Reward) -> tuple[str, Reward]:
    if not isinstance(entry, str):
        return getattr(entry, "__name__", type(entry).__name__), entry
    if entry not in REGISTERED:
        raise ValueError(
            f"unknown reward {entry!r}; known: {', '.join(sorted(REGISTERED))}, or pass a callable"
        )
    module, _, name = REGISTERED[entry].partition(":")
    function: Reward = getattr(importlib.import_module(module), name)
    return entry, function


def _checked(
    name: str, function: Reward, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]
) -> Tensor:
    remedy = "fix the reward, or set on_reward_error='skip' to drop such rollouts"
    try:
        raw = function(images, prompts, metadata)
    except Exception as error:
        raise RewardError(
            f"reward {name!r} raised {type(error).__name__}: {error} for prompts {_some(prompts)}; {remedy}"
        ) from error
    scores = torch.as_tensor(raw).detach().float().cpu()
    if scores.shape != (len(prompts),):
        raise RewardError(
            f"reward {name!r} returned shape {tuple(scores.shape)} for {len(prompts)} images; "
            "return one number per image"
        )
    finite = scores.isfinite()
    if not bool(finite.all()):
        culprits = [prompt for prompt, good in zip(prompts, finite.tolist(), strict=True) if not good]
        raise RewardError(
            f"reward {name!r} returned {scores[~finite][0].item()} for prompts {_some(culprits)}; {remedy}"
        )
    return scores


def _some(prompts: list[str]) -> str:
    return f"{prompts[:3]}" + (f" and {len(prompts) - 3} more" if len(prompts) > 3 else "")
