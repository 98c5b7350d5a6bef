"""Rewards by name or as callables: lookup, call, and a check of the scores before they are learned from."""

from __future__ import annotations

import importlib
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lacfast.config.checks import unknown
from lacfast.prompts import PromptSet
from lacfast.rewards.names import registered_rewards, require_known, server
from lacfast.rewards.reward import (
    TIME_LIMIT_S,
    Cancellable,
    Checkable,
    Judged,
    Loadable,
    NotFiniteError,
    Reward,
    RewardError,
)
from lacfast.rewards.workers import Caller, TooLongError
from lacfast.runtime.profiling import span

_REMOTE = "lacfast.rewards.remote:RemoteReward"
_FLOW_GRPO_WIRE = "lacfast.rewards.wire:FlowGRPOFormat"

RewardSpec = str | Reward | Sequence[str | Reward] | Mapping[str | Reward, float]
"""One reward, several of equal weight, or reward -> weight; each a callable, a registered name, the
"package.module:callable" of one of yours, or the http(s) URL of a reward server, after "flow_grpo+" of one
that speaks flow_grpo's format, and after "name=" where the scores shall have a name that stays."""


@dataclass(frozen=True)
class RewardSet:
    """Named rewards with weights."""

    functions: dict[str, Reward]
    weights: Tensor
    """(M,) float32, in the order of `functions`."""

    @staticmethod
    def create(spec: RewardSet | RewardSpec) -> RewardSet:
        """Resolve names and callables; a set is itself.

        Raises:
            ValueError: for an unknown name (the known are listed), two rewards of one name, or no reward.
        """
        if isinstance(spec, RewardSet):
            return spec
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
        for name, limit_s in ((name, _time_limit(function)) for name, function in functions.items()):
            if not limit_s > 0:
                raise ValueError(
                    f"reward {name!r} has time_limit_s={limit_s!r}; give it seconds above 0, or math.inf for "
                    "no limit"
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

    @staticmethod
    def require_judges(scorers: Sequence[RewardSet], prompts: PromptSet, held_out: PromptSet) -> None:
        """A check of the rewards that train, which come first, on `prompts` and of all on `held_out`.

        Raises:
            ValueError: for a prompt that a reward cannot judge an image of, as far as the reward tells.
        """
        scorers[0].require_prompts(prompts)
        for scorer in scorers:
            scorer.require_prompts(held_out)

    def require_prompts(self, prompts: PromptSet) -> None:
        """
        Raises:
            ValueError: for a prompt that a reward cannot judge an image of, as far as the reward tells.
        """
        for name, function in self.functions.items():
            check: Judged | None = getattr(function, "check_prompt", None)
            if check is None:
                continue
            for text, metadata in zip(prompts.texts, prompts.metadata, strict=True):
                try:
                    check(text, metadata)
                except ValueError as error:
                    raise ValueError(f"reward {name!r} cannot judge prompt {text!r}: {error}") from error

    def score(
        self,
        images: Tensor,
        prompts: list[str],
        metadata: list[dict[str, Any]],
        origin: Callable[[], str] | None = None,
        *,
        caller: Caller | None = None,
    ) -> dict[str, Tensor]:
        """name -> (B,) float32 on the CPU.

        Args:
            images: (B, 3, H, W)
            prompts: B of them.
            metadata: B of them.
            origin: as in require_finite.
            caller: makes the rewards' calls, and leaves one that hangs. None: one of this call's own.

        Raises:
            RewardError: when a reward raises, takes too long, returns another length or a value that is not
                finite.
            NotFiniteError: when an image is not finite, before any reward is asked.
        """
        require_finite(images, prompts, origin)
        own = Caller("lacfast-reward") if caller is None else caller
        try:
            with span("reward"):
                return {
                    name: _checked(name, function, images, prompts, metadata, own)
                    for name, function in self.functions.items()
                }
        finally:
            if caller is None:
                own.close()

    def check(self) -> None:
        """Ask, in seconds, for what the rewards need: servers, files of models.

        Raises:
            RewardError: for what is not there.
        """
        rewards: list[object] = list(self.functions.values())
        for reward in rewards:
            if isinstance(reward, Checkable):
                reward.check()

    def prepared(self) -> RewardSet:
        """The set itself, after it asked for what its rewards need and loaded their models.

        Raises:
            RewardError: for what is not there or cannot be loaded.
        """
        self.check()
        rewards: dict[str, object] = dict(self.functions)
        for name, reward in rewards.items():
            if isinstance(reward, Loadable):
                try:
                    reward.prepare()
                except Exception as error:
                    reason = str(error).strip().partition("\n")[0]
                    raise RewardError(
                        f"reward {name!r} cannot be loaded: {type(error).__name__}: {reason}; download its "
                        "model where there is a network, or pass the reward with its directory"
                    ) from error
        return self

    def cancel(self) -> None:
        """End the calls that other threads have in work, of rewards that can."""
        rewards: list[object] = list(self.functions.values())
        for reward in rewards:
            if isinstance(reward, Cancellable):
                reward.cancel()


def _named(entry: str | Reward) -> tuple[str, Reward]:
    """The name of a reward and the reward."""
    if not isinstance(entry, str):
        given = getattr(entry, "name", None)
        return given if isinstance(given, str) else getattr(entry, "__name__", type(entry).__name__), entry
    address = server(entry)
    if address is not None:
        made = {"wire": _imported(_FLOW_GRPO_WIRE)()} if address.speaks_flow_grpo else {}
        return address.name, _imported(_REMOTE)(urls=(address.url,), name=address.name, **made)
    require_known([entry])
    registered = registered_rewards()
    location = registered.get(entry, entry)
    reward = _imported(location)
    if isinstance(reward, type):
        reward = _made(location, reward)
    if not callable(reward):
        raise ValueError(
            f"reward {entry!r} is a {type(reward).__name__}, which cannot be called; write a function of "
            "(images, prompts, metadata)"
        )
    return entry if entry in registered else entry.partition(":")[2], reward


def _made(location: str, kind: type) -> Any:
    try:
        return kind()
    except TypeError as error:
        raise ValueError(
            f"reward {location!r} cannot be made without settings: {error}; give them defaults, or pass an "
            "instance in Python"
        ) from error


def _imported(location: str) -> Any:
    """The object that "module:name" says; a module may lie in the current directory.

    Raises:
        ValueError: when there is no such module or name, or the module cannot be run.
    """
    module_name, _, name = location.partition(":")
    top = module_name.partition(".")[0]
    here = Path.cwd()
    # A console script does not look there, where `python -m` does.
    if str(here) not in sys.path and ((here / top).is_dir() or (here / f"{top}.py").is_file()):
        sys.path.append(str(here))
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        missing = str(error.name)
        if missing == module_name or module_name.startswith(f"{missing}."):
            raise ValueError(
                f"reward {location!r} cannot be imported: there is no module {missing!r} in {here} or "
                "installed; start in its directory, or install its package"
            ) from error
        raise ValueError(
            f"reward {location!r} cannot be imported: its module needs {missing!r}, which is not installed; "
            f"install it, say by pip install {missing.partition('.')[0]}"
        ) from error
    except SyntaxError as error:
        raise ValueError(
            f"reward {location!r} cannot be imported: {error.msg} in {error.filename}, line {error.lineno}; "
            "mend it there"
        ) from error
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        raise ValueError(
            f"reward {location!r} cannot be imported: {type(error).__name__}: {error} in {place.filename}, "
            f"line {place.lineno}; mend it there"
        ) from error
    if not hasattr(module, name):
        names = [each for each, value in vars(module).items() if callable(value) and not each.startswith("_")]
        raise unknown(f"name in module {module_name!r}", name, names, f"The reward was {location!r}")
    return getattr(module, name)


def _time_limit(function: Reward) -> float:
    limit_s: float = getattr(function, "time_limit_s", TIME_LIMIT_S)
    return limit_s


def _checked(
    name: str,
    function: Reward,
    images: Tensor,
    prompts: list[str],
    metadata: list[dict[str, Any]],
    caller: Caller,
) -> Tensor:
    remedy = "fix the reward, or set on_reward_error='skip' to drop such rollouts"
    limit_s = _time_limit(function)
    try:
        # What a reward changes in place is its own: the others and later iterations see what was made.
        raw = caller(partial(function, images.clone(), list(prompts), _copied(metadata)), limit_s, images)
    except TooLongError as error:
        raise RewardError(
            f"reward {name!r} has not returned for {limit_s:g} s for prompts {_some(prompts)} and is left "
            f"behind; {remedy}; one that needs longer says so by an attribute time_limit_s, in seconds"
        ) from error
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


def require_finite(images: Tensor, prompts: list[str], origin: Callable[[], str] | None = None) -> None:
    """A check of images (B, 3, H, W) before anybody looks at them.

    Args:
        images: of `prompts`.
        prompts: B of them.
        origin: says where a NaN came from, once there is one. None: nobody knows.

    Raises:
        NotFiniteError: naming the prompts and the origin.
    """
    # As a JPEG file a picture of NaN is black, and nearly the best there is.
    finite = images.isfinite().flatten(1).all(dim=1)
    if not bool(finite.all()):
        culprits = [prompt for prompt, good in zip(prompts, finite.tolist(), strict=True) if not good]
        raise NotFiniteError(
            f"{origin() if origin else 'sampling or decoding'} made NaN or infinity in the images of prompts "
            f"{_some(culprits)}, so that no reward was asked; lower the learning rate or the guidance scale, "
            "or use float32 or bfloat16"
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
