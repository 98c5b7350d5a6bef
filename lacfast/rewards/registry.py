"""Rewards by name or as callables: lookup, call, and a check of the scores before they are learned from."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lacfast.rewards.reward import Cancellable, Reward, RewardError
from lacfast.runtime.profiling import span

BUILT_IN: dict[str, str] = {
    "aesthetic": "lacfast.rewards.aesthetic:AestheticScore",
    "clip_score": "lacfast.rewards.clip:CLIPScore",
    "hpsv2": "lacfast.rewards.hpsv2:HPSv2",
    "image_reward": "lacfast.rewards.image_reward:ImageReward",
    "jpeg_compressibility": "lacfast.rewards.jpeg:jpeg_compressibility",
    "jpeg_incompressibility": "lacfast.rewards.jpeg:jpeg_incompressibility",
    "ocr": "lacfast.rewards.ocr:OCRAccuracy",
    "pickscore": "lacfast.rewards.clip:PickScore",
}
"""Reward name -> "module:callable", imported at first use; a class is made with its default settings."""

ENTRY_POINTS = "lacfast.rewards"
"""Group of the entry points by which installed packages name rewards of theirs, in the same form."""

_REMOTE = "lacfast.rewards.remote:RemoteReward"
_FLOW_GRPO = "flow_grpo+"
_FLOW_GRPO_WIRE = "lacfast.rewards.wire:FlowGRPOFormat"

RewardSpec = str | Reward | Sequence[str | Reward] | Mapping[str | Reward, float]
"""One reward, several of equal weight, or reward -> weight; each a callable, a registered name, the
"package.module:callable" of one of yours, or the http(s) URL of a reward server, after
"flow_grpo+" of one that speaks flow_grpo's format."""


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
            known = ", ".join(registered_rewards())
            raise ValueError(f"there is no reward to train on; pass a callable or one of: {known}")
        functions = dict(_named(entry) for entry in weighted)
        if len(functions) != len(weighted):
            raise ValueError(
                f"two rewards share a name: {[_named(entry)[0] for entry in weighted]}; "
                "wrap one in a function of another name"
            )
        return RewardSet(functions, torch.tensor(list(weighted.values()), dtype=torch.float32))

    @staticmethod
    def union(sets: Sequence[RewardSet]) -> RewardSet:
        """All rewards of several sets; of two that share a name the first counts."""
        functions: dict[str, Reward] = {}
        weights: list[Tensor] = []
        for rewards in sets:
            new = [index for index, name in enumerate(rewards.names) if name not in functions]
            functions |= {rewards.names[index]: rewards.functions[rewards.names[index]] for index in new}
            weights.append(rewards.weights[new])
        return RewardSet(functions, torch.cat(weights))

    @property
    def names(self) -> list[str]:
        return list(self.functions)

    def score(self, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> dict[str, Tensor]:
        """name -> (B,) float32 on the CPU.

        Raises:
            RewardError: when a reward raises, returns another length or a value that is not finite; when an
                image is not finite, before any reward is asked.
        """
        _require_finite(images, prompts)
        with span("reward"):
            return {
                name: _checked(name, function, images, prompts, metadata)
                for name, function in self.functions.items()
            }

    def cancel(self) -> None:
        """End the calls that other threads have in work, of rewards that can."""
        rewards: list[object] = list(self.functions.values())
        for reward in rewards:
            if isinstance(reward, Cancellable):
                reward.cancel()


def registered_rewards() -> dict[str, str]:
    """Reward name -> "module:callable": the built-in ones, and those that installed packages name."""
    found = {point.name: point.value for point in entry_points(group=ENTRY_POINTS)}
    return dict(sorted({**found, **BUILT_IN}.items()))


def _named(entry: str | Reward) -> tuple[str, Reward]:
    """The name of a reward and the reward."""
    if not isinstance(entry, str):
        given = getattr(entry, "name", None)
        return given if isinstance(given, str) else getattr(entry, "__name__", type(entry).__name__), entry
    url = entry.removeprefix(_FLOW_GRPO)
    if url.startswith(("http://", "https://")):
        made = {"wire": _imported(_FLOW_GRPO_WIRE)()} if url != entry else {}
        return entry, _imported(_REMOTE)(urls=(url,), **made)
    if ":" in entry:
        reward = _imported(entry)
        return entry.partition(":")[2], reward() if isinstance(reward, type) else reward
    registered = registered_rewards()
    if entry not in registered:
        raise ValueError(
            f"unknown reward {entry!r}; known: {', '.join(registered)}; or pass a callable, "
            "'package.module:callable', or the URL of a reward server"
        )
    reward = _imported(registered[entry])
    return entry, reward() if isinstance(reward, type) else reward


def _imported(location: str) -> Any:
    """The object that "module:name" says.

    Raises:
        ValueError: when there is no such module or name; other errors of the import pass through.
    """
    module_name, _, name = location.partition(":")
    try:
        return getattr(importlib.import_module(module_name), name)
    except (ModuleNotFoundError, AttributeError) as error:
        raise ValueError(f"reward {location!r} cannot be imported: {error}") from error


def _checked(
    name: str, function: Reward, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]
) -> Tensor:
    remedy = "fix the reward, or set on_reward_error='skip' to drop such rollouts"
    try:
        # What a reward changes in place is its own: the others and later iterations see what was made.
        raw = function(images.clone(), list(prompts), _copied(metadata))
    except Exception as error:
        raise RewardError(
            f"reward {name!r} raised {type(error).__name__}: {error} for prompts {_some(prompts)}; {remedy}"
        ) from error
    try:
        scores = torch.as_tensor(raw).detach().to("cpu", torch.float32)
    except Exception as error:
        raise RewardError(
            f"reward {name!r} returned a {type(raw).__name__} that is no tensor of numbers; "
            "return one number per image, as a tensor, an array or a list"
        ) from error
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


def _require_finite(images: Tensor, prompts: list[str]) -> None:
    # As a JPEG file a picture of NaN is black, and nearly the best there is.
    finite = images.isfinite().flatten(1).all(dim=1)
    if not bool(finite.all()):
        culprits = [prompt for prompt, good in zip(prompts, finite.tolist(), strict=True) if not good]
        raise RewardError(
            f"sampling or decoding made NaN or infinity in the images of prompts {_some(culprits)}, so that "
            "no reward was asked; lower the learning rate or the guidance scale, or use float32 or bfloat16"
        )


def _copied(value: Any) -> Any:
    """Containers, arrays and tensors anew; objects of other classes are the same."""
    if isinstance(value, dict):
        return {key: _copied(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_copied(each) for each in value]
    if isinstance(value, Tensor):
        return value.clone()
    return value.copy() if isinstance(value, np.ndarray | set) else value


def _some(prompts: list[str]) -> str:
    return f"{prompts[:3]}" + (f" and {len(prompts) - 3} more" if len(prompts) > 3 else "")
