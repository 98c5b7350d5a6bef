"""Rewards by name or as callables: lookup, call, and a check of the scores before they are learned from."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from threading import BoundedSemaphore
from typing import Any

import torch
from torch import Tensor

from lacfast.profiling import span
from lacfast.protocols import Reward

REGISTERED: dict[str, str] = {
    "aesthetic": "lacfast.rewards.aesthetic:AestheticScore",
    "clip_score": "lacfast.rewards.clip_score:CLIPScore",
    "glyphs": "lacfast.tasks.glyphs:glyphs_reward",
    "glyphs_gold": "lacfast.tasks.glyphs:glyphs_gold",
    "glyphs_strict": "lacfast.tasks.glyphs:glyphs_strict",
    "hpsv2": "lacfast.rewards.hpsv2:HPSv2",
    "image_reward": "lacfast.rewards.image_reward:ImageReward",
    "jpeg_compressibility": "lacfast.rewards.jpeg:jpeg_compressibility",
    "jpeg_incompressibility": "lacfast.rewards.jpeg:jpeg_incompressibility",
    "ocr": "lacfast.rewards.ocr:OCRAccuracy",
    "pickscore": "lacfast.rewards.pickscore:PickScore",
    "shapes": "lacfast.tasks.shapes:shapes_reward",
    "shapes_strict": "lacfast.tasks.shapes:shapes_strict",
    "shapes_partial": "lacfast.tasks.shapes:shapes_partial",
    "shapes_gold": "lacfast.tasks.shapes:shapes_gold",
    "shapes_height": "lacfast.tasks.shapes:shapes_height",
}
"""Reward name -> "module:callable", imported at first use; a class is made with its default settings."""

_REMOTE = "lacfast.rewards.remote:RemoteReward"
_FLOW_GRPO = "flow_grpo+"
_FLOW_GRPO_WIRE = "lacfast.rewards.wire:FlowGRPOFormat"

RewardSpec = str | Reward | Sequence[str | Reward] | Mapping[str | Reward, float]
"""One reward, several of equal weight, or reward -> weight; each a callable, a registered name, the
"package.module:callable" of one of yours, or the http(s) URL of a reward server, after
"flow_grpo+" of one that speaks flow_grpo's format."""


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
        with span("reward"):
            return {
                name: _checked(name, function, images, prompts, metadata)
                for name, function in self.functions.items()
            }


class RewardQueue:
    """Scores batches in a thread of its own, so that the next batch is sampled meanwhile.

    Batches are scored one at a time, in the order in which they were submitted. A reward that fails does so
    in the `result()` of its own batch; the others are not touched. On CUDA the images are awaited on a stream
    of the queue, not on the host, and their memory is not reused before that stream has read them.
    """

    def __init__(self, rewards: RewardSet, *, max_pending: int = 2) -> None:
        """
        Args:
            rewards: what scores; its rewards are then called from one other thread.
            max_pending: batches that may be unfinished, >= 1. Each keeps its images in memory.
        """
        if max_pending < 1:
            raise ValueError(f"max_pending={max_pending} lets no batch in; use 1 or more")
        self.rewards = rewards
        self._places = BoundedSemaphore(max_pending)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="lacfast-rewards")
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._closed = False

    def submit(
        self, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]
    ) -> Future[dict[str, Tensor]]:
        """Scores that will come: `result()` waits and is what `RewardSet.score` returns or raises.

        Blocks while `max_pending` batches are unfinished.

        Args:
            images: (B, 3, H, W) in [0, 1]; must not be written to before the scores are there.
            prompts: B of them.
            metadata: B of them.

        Raises:
            ValueError: after `close`.
        """
        if self._closed:
            raise ValueError("this reward queue is closed; make another one")
        self._places.acquire()
        images = images.detach()
        ready = None
        if images.is_cuda:
            ready = torch.cuda.Event()  # type: ignore[no-untyped-call]
            ready.record(torch.cuda.current_stream(images.device))
        future = self._thread.submit(self._score, images, prompts, metadata, ready)
        future.add_done_callback(lambda _: self._places.release())
        return future

    def close(self, *, cancel: bool = False) -> None:
        """Wait for the batch in work, and for the others too unless `cancel`; then end the thread."""
        self._closed = True
        self._thread.shutdown(wait=True, cancel_futures=cancel)

    def __enter__(self) -> RewardQueue:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # Nobody will read the scores of batches that an error left behind.
        self.close(cancel=kind is not None)

    # Whether autograd is on belongs to a thread: the caller's no_grad does not reach this one.
    @torch.no_grad()
    def _score(
        self,
        images: Tensor,
        prompts: list[str],
        metadata: list[dict[str, Any]],
        ready: torch.cuda.Event | None,
    ) -> dict[str, Tensor]:
        stream = None
        if ready is not None:
            if images.device not in self._streams:
                made = torch.cuda.Stream(images.device)  # type: ignore[no-untyped-call]
                self._streams[images.device] = made
            stream = self._streams[images.device]
            stream.wait_event(ready)
            # The allocator must not hand the memory out again before this stream has read it.
            images.record_stream(stream)
        with nullcontext() if stream is None else torch.cuda.stream(stream):
            return self.rewards.score(images, prompts, metadata)


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
    if entry not in REGISTERED:
        raise ValueError(
            f"unknown reward {entry!r}; known: {', '.join(sorted(REGISTERED))}; or pass a callable, "
            "'package.module:callable', or the URL of a reward server"
        )
    reward = _imported(REGISTERED[entry])
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
