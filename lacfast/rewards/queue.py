"""Decoding and scoring of one batch while the next one is sampled: threads and CUDA streams of their own."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from threading import BoundedSemaphore
from typing import Any

import torch
from torch import Tensor

from lacfast.rewards.registry import RewardSet
from lacfast.rewards.reward import RewardError
from lacfast.rewards.workers import Caller, Workers
from lacfast.runtime.profiling import span

log = logging.getLogger(__name__)

_LEAVE_BEHIND_S = 5.0
"""How long the end of a failed or interrupted run waits for the batch in work."""


class DecodeError(RewardError):
    """Latents could not be decoded, so there is nothing to score."""


@dataclass(frozen=True)
class _Ready:
    """A tensor, and on CUDA the event after which another stream may read it."""

    tensor: Tensor
    event: torch.cuda.Event | None

    @staticmethod
    def of(tensor: Tensor) -> _Ready:
        """What the current stream makes of `tensor`."""
        if not tensor.is_cuda:
            return _Ready(tensor, None)
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(tensor.device))
        return _Ready(tensor, event)


class _Stage:
    """A thread that works off one batch after the other, on one CUDA stream per device."""

    def __init__(self, name: str) -> None:
        self.worker = Workers(1, name)
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    @contextmanager
    def reading(self, ready: _Ready) -> Iterator[Tensor]:
        """Within the context the stage's own stream is current, and the tensor has its values there."""
        tensor = ready.tensor
        if ready.event is None:
            yield tensor
            return
        if tensor.device not in self._streams:
            made = torch.cuda.Stream(tensor.device)  # type: ignore[no-untyped-call]
            self._streams[tensor.device] = made
        stream = self._streams[tensor.device]
        stream.wait_event(ready.event)
        # The allocator must not hand the memory out again before this stream has read it.
        tensor.record_stream(stream)
        with torch.cuda.stream(stream):
            yield tensor


class RewardQueue:
    """Scores batches in a thread of its own, so that the next batch is sampled meanwhile.

    Batches are decoded and scored one at a time, in the order in which they were submitted. One that fails
    does so in the `result()` of its own batch; the others are not touched. On CUDA each of the two stages has
    a stream of its own, which waits for the batch there and not on the host; memory is not reused before it
    was read. At most `max_pending` batches are in memory, as latents, as images, or both.
    """

    def __init__(
        self,
        rewards: RewardSet,
        *,
        decode: Callable[[Tensor], Tensor] | None = None,
        decode_aside: bool = False,
        max_pending: int = 2,
    ) -> None:
        """
        Args:
            rewards: what scores; its rewards are then called from one other thread.
            decode: makes images (B, 3, H, W) in [0, 1] of what is submitted. None: images are submitted.
            decode_aside: decode in another thread than the caller's too. It pays on CUDA; on a CPU it would
                compete with the caller's sampling for the same cores.
            max_pending: batches that may be unfinished, >= 1.
        """
        if max_pending < 1:
            raise ValueError(f"max_pending={max_pending} lets no batch in; use 1 or more")
        self.rewards = rewards
        self.decode = decode
        self._places = BoundedSemaphore(max_pending)
        self._decoding = _Stage("lacfast-decode") if decode_aside else None
        self._scoring = _Stage("lacfast-rewards")
        self._caller = Caller()
        self._closed = False

    def submit(
        self,
        batch: Tensor,
        prompts: list[str],
        metadata: list[dict[str, Any]],
        origin: Callable[[], str] | None = None,
    ) -> Future[dict[str, Tensor]]:
        """Scores that will come: `result()` waits and is what `RewardSet.score` returns or raises.

        Blocks while `max_pending` batches are unfinished.

        Args:
            batch: images (B, 3, H, W) in [0, 1], or what `decode` takes; must not be written to before the
                scores are there.
            prompts: B of them.
            metadata: B of them.
            origin: says what made the batch's NaN, once its images have some. None: nobody knows.

        Raises:
            ValueError: after `close`.
        """
        if self._closed:
            raise ValueError("this reward queue is closed; make another one")
        self._places.acquire()
        ready = _Ready.of(batch.detach())
        images = self._decoded(ready, prompts)
        future = self._scoring.worker.submit(partial(self._score, images, prompts, metadata, origin))
        future.add_done_callback(lambda _: self._places.release())
        return future

    def close(self, *, cancel: bool = False) -> None:
        """End the threads: after all batches, or with `cancel` within seconds.

        Then batches that have not begun are dropped, and rewards that can are told to `cancel`. A batch that
        is still in work after five seconds is left behind; it does not keep the process.
        """
        self._closed = True
        if cancel:
            self.rewards.cancel()
        for stage in (self._decoding, self._scoring):
            wait_s = _LEAVE_BEHIND_S if cancel else math.inf
            if stage is not None and not stage.worker.close(cancel=cancel, wait_s=wait_s):
                log.warning("%s are still at work and left behind", self.rewards.names)
        self._caller.close()

    def __enter__(self) -> RewardQueue:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # Nobody will read the scores of batches that an error left behind.
        self.close(cancel=kind is not None)

    def _decoded(self, batch: _Ready, prompts: list[str]) -> Future[_Ready]:
        if self._decoding is not None:
            return self._decoding.worker.submit(partial(self._decode, batch, prompts))
        done: Future[_Ready] = Future()
        try:
            done.set_result(self._decode(batch, prompts))
        except DecodeError as error:
            done.set_exception(error)
        return done

    # Whether autograd is on belongs to a thread: the caller's no_grad does not reach the others.
    @torch.no_grad()
    def _decode(self, batch: _Ready, prompts: list[str]) -> _Ready:
        if self.decode is None:
            return batch
        try:
            if self._decoding is None:
                with span("decode"):
                    return _Ready.of(self.decode(batch.tensor))
            with self._decoding.reading(batch) as latents, span("decode"):
                return _Ready.of(self.decode(latents))
        except Exception as error:
            raise DecodeError(
                f"decoding raised {type(error).__name__}: {error} for {len(prompts)} latents of prompts "
                f"{prompts[:3]}...; if memory is short, lower rollout_batch_size or eval_batch_size"
            ) from error

    @torch.no_grad()
    def _score(
        self,
        decoded: Future[_Ready],
        prompts: list[str],
        metadata: list[dict[str, Any]],
        origin: Callable[[], str] | None,
    ) -> dict[str, Tensor]:
        with self._scoring.reading(decoded.result()) as images:
            return self.rewards.score(images, prompts, metadata, origin, caller=self._caller)
