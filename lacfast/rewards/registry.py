"""Rewards by name or as callables: lookup, call, and a check of the scores before they are learned from."""

from __future__ import annotations

import importlib
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lacfast.config.checks import unknown
from lacfast.prompts import PromptSet
from lacfast.rewards.frames import JUDGED_FRAMES
from lacfast.rewards.names import registered_rewards, reward_location, server
from lacfast.rewards.reward import Cancellable, Checkable, Declaration, Judged, Loadable, Reward, RewardError
from lacfast.rewards.scoring import require_finite, require_reference, scored, time_limit
from lacfast.rewards.workers import Caller
from lacfast.runtime.profiling import span

_SERVERS = {
    "": "lacfast.rewards.remote:RemoteReward",
    "flow_grpo": "lacfast.rewards.remote:RemoteReward",
    "unified_reward": "lacfast.rewards.judge:UnifiedReward",
}
"""What a server speaks -> the class of its reward."""
_FLOW_GRPO_WIRE = "lacfast.rewards.wire:FlowGRPOFormat"

RewardSpec = str | Reward | Sequence[str | Reward] | Mapping[str | Reward, float]
"""One reward, several of equal weight, or reward -> weight; each a callable, a registered name, the
"package.module:callable" of one of yours, or the http(s) URL of a reward server, after "flow_grpo+" of one
that speaks flow_grpo's format, after "unified_reward+" of one that runs a UnifiedReward, and after "name="
where the scores shall have a name that stays."""


@dataclass(frozen=True)
class RewardSet:
    """Named rewards with weights."""

    functions: dict[str, Reward]
    """The rewards by their own names."""
    heads: dict[str, tuple[str, ...]]
    """Reward -> names of its scores: its own, or those that it declares."""
    weights: Tensor
    """(M,) float32 of the scores, in the order of `names`."""
    judged: int = JUDGED_FRAMES
    """Frames of a video that rewards of images judge."""

    @staticmethod
    def create(spec: RewardSet | RewardSpec) -> RewardSet:
        """Resolve names and callables; a set is itself.

        Raises:
            ValueError: for an unknown name (the known are listed), two rewards or scores of one name, or no
                reward.
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
        for name, limit_s in ((name, time_limit(function)) for name, function in functions.items()):
            if not limit_s > 0:
                raise ValueError(
                    f"reward {name!r} has time_limit_s={limit_s!r}; give it seconds above 0, or math.inf for "
                    "no limit"
                )
        declared = {name: Declaration.of(function).head_weights(name) for name, function in functions.items()}
        _require_different([head for heads in declared.values() for head in heads])
        weights = [
            weight * share
            for weight, heads in zip(weighted.values(), declared.values(), strict=True)
            for share in heads.values()
        ]
        return RewardSet(
            functions,
            {name: tuple(heads) for name, heads in declared.items()},
            torch.tensor(weights, dtype=torch.float32),
        )

    @staticmethod
    def scorers(specs: Sequence[RewardSet | RewardSpec | None], frames: int) -> list[RewardSet]:
        """The sets of what is not None, prepared; `frames` as `judging`.

        Raises:
            ValueError: see `create` and `judging`.
            RewardError: see `prepared`.
        """
        found = [RewardSet.create(each).judging(frames) for each in specs if each is not None]
        return [each.prepared() for each in found]

    @staticmethod
    def union(sets: Sequence[RewardSet]) -> RewardSet:
        """All rewards of several sets; of two that share a name the first counts.

        Raises:
            ValueError: when rewards of different names share the name of a score.
        """
        functions: dict[str, Reward] = {}
        heads: dict[str, tuple[str, ...]] = {}
        weights: list[float] = []
        for rewards in sets:
            given = dict(zip(rewards.names, rewards.weights.tolist(), strict=True))
            for name in [name for name in rewards.functions if name not in functions]:
                functions[name], heads[name] = rewards.functions[name], rewards.heads[name]
                weights += [given[head] for head in heads[name]]
        union = RewardSet(functions, heads, torch.tensor(weights, dtype=torch.float32), sets[0].judged)
        _require_different(union.names)
        return union

    def judging(self, frames: int) -> RewardSet:
        """The rewards of a model's images, or of its videos.

        Args:
            frames: of a video that rewards of images judge; 0: the model makes images.

        Raises:
            ValueError: for a reward of videos where images are made.
        """
        videos = [name for name, each in self.functions.items() if Declaration.of(each).video]
        if videos and not frames:
            raise ValueError(
                f"reward {videos[0]!r} judges videos and the model makes images; leave it out, or train a "
                "model of videos"
            )
        return replace(self, judged=frames or self.judged)

    @property
    def names(self) -> list[str]:
        """Names of the M scores, which are the heads of a critic."""
        return [head for heads in self.heads.values() for head in heads]

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
            key = Declaration.of(function).reference
            own: Judged | None = getattr(function, "check_prompt", None)
            checks: list[Judged] = [own] if own else []
            if key:
                checks.append(partial(require_reference, key=key))
            for check, (text, metadata) in product(checks, zip(prompts.texts, prompts.metadata, strict=True)):
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
            images: (B, 3, H, W) or videos (B, F, 3, H, W)
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
        own = Caller() if caller is None else caller
        try:
            with span("reward"):
                return {
                    head: scores
                    for name, function in self.functions.items()
                    for head, scores in scored(
                        name, function, images, prompts, metadata, own, judged=self.judged
                    ).items()
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


def declared_heads(entry: str) -> tuple[str, ...]:
    """Names of the scores of a reward that is written as text; none of its packages or models is asked for.

    Raises:
        ValueError: for one that cannot be found.
    """
    name, location = _located(entry)
    return tuple(Declaration.of(_imported(location)).head_weights(name))


def _require_different(names: Sequence[str]) -> None:
    """
    Raises:
        ValueError: when two of the scores share a name.
    """
    if len(set(names)) != len(names):
        raise ValueError(f"two rewards share a name: {list(names)}; wrap one in a function of another name")


def _named(entry: str | Reward) -> tuple[str, Reward]:
    """The name of a reward and the reward."""
    if not isinstance(entry, str):
        given = getattr(entry, "name", None)
        return given if isinstance(given, str) else getattr(entry, "__name__", type(entry).__name__), entry
    name, location = _located(entry)
    reward = _imported(location)
    address = server(entry)
    if address is not None:
        made = {"wire": _imported(_FLOW_GRPO_WIRE)()} if address.speaks == "flow_grpo" else {}
        return name, reward(urls=(address.url,), name=name, **made)
    if isinstance(reward, type):
        reward = _made(location, reward)
    if not callable(reward):
        raise ValueError(
            f"reward {entry!r} is a {type(reward).__name__}, which cannot be called; write a function of "
            "(images, prompts, metadata)"
        )
    return name, reward


def _located(entry: str) -> tuple[str, str]:
    """The name of a reward that is written as text, and the "module:name" that makes it.

    Raises:
        ValueError: for one that nothing has.
    """
    address = server(entry)
    if address is not None:
        return address.name, _SERVERS[address.speaks]
    return entry.partition(":")[2] or entry, reward_location(entry)


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
