"""A reward on other machines: batches over HTTP, with time limits, retries and several servers."""

from __future__ import annotations

import logging
import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, CancelledError, wait
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from threading import Event
from typing import Any
from urllib.parse import urlsplit

import torch
from torch import Tensor

from lacfast.config.checks import Config, Count, NonNegative, Positive, Share
from lacfast.rewards.credentials import authorization
from lacfast.rewards.exchange import UnavailableError, post, reach
from lacfast.rewards.names import require_url
from lacfast.rewards.reward import BadAnswerError, Declaration, RewardError
from lacfast.rewards.wire import JSONFormat, WireFormat
from lacfast.rewards.workers import Workers

log = logging.getLogger(__name__)

_BUSY_STATUSES = {408, 425, 429}
_REACH_S = 10.0
"""Seconds in which a server must let a run in that begins."""
_MAX_SCORE = torch.finfo(torch.float32).max


@dataclass(frozen=True, kw_only=True)
class RetryConfig(Config):
    """When a request is tried again, and when a batch is given up."""

    timeout_s: Positive = 120.0
    """Seconds that one request may take, from connecting to the answer's last byte; flow_grpo's too."""
    give_up_s: NonNegative = 600.0
    """Seconds of unreachable, slow or failing (5xx) servers after which a batch fails. Only its first request
    may last longer, for `timeout_s`."""
    max_bad_answers: Count = 3
    """Answers without usable scores (4xx, wrong length, NaN, unreadable) after which a batch fails:
    time rarely mends these."""
    backoff_s: Positive = 0.5
    """Pause after the first round in which every server failed; doubled after each further one."""
    max_backoff_s: Positive = 30.0
    """Longest pause; also how long a server that failed is asked last."""
    jitter: Share = 0.5
    """Share of each pause that is random: many trainers must not come back at the same moment."""


_LONGER = "start them, or wait longer by RetryConfig(timeout_s=..., give_up_s=...)"


@dataclass(kw_only=True, eq=False)
class RemoteReward:
    """Scores from HTTP servers. Each batch goes to one of them; what one cannot do, the next one does."""

    # Its own limits are those of `retry`.
    time_limit_s = math.inf
    # An instance has that of its wire format.
    declaration = Declaration()

    urls: Sequence[str]
    """One or more servers that give the same scores, "http(s)://host:port/path"."""
    name: str = "remote"
    """Name under which the scores are reported."""
    wire: WireFormat = field(default_factory=JSONFormat)
    """JSONFormat() or FlowGRPOFormat()."""
    batch_size: int = 64
    """Images per request, >= 1."""
    concurrency: int = 1
    """Requests in flight per server, >= 1."""
    retry: RetryConfig = field(default_factory=RetryConfig)
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    """Further headers of every request. Without Authorization: what lacfast.rewards.credentials finds."""
    pause: Callable[[Event, float], object] = field(default=Event.wait, repr=False)
    """Waits some seconds or for the event; tests put in their own."""
    clock: Callable[[], float] = field(default=time.monotonic, repr=False)
    """Seconds; tests put in their own."""
    _credentials: dict[str, dict[str, str]] = field(default_factory=dict, init=False, repr=False)
    _calls: set[Workers] = field(default_factory=set, init=False, repr=False)
    _avoid_until: dict[str, float] = field(default_factory=dict, init=False, repr=False)
    # Not the global generator: retries must not change what a seeded run draws.
    _random: random.Random = field(default_factory=random.Random, init=False, repr=False)

    def __post_init__(self) -> None:
        if isinstance(self.urls, str) or not self.urls:
            raise ValueError(f"urls={self.urls!r}; pass a list of at least one server")
        for url in self.urls:
            require_url(url)
            host = str(urlsplit(url).hostname)
            given = {name.lower() for name in self.headers}
            found = None if "authorization" in given else authorization(host)
            if found is not None:
                self._credentials[url] = {"Authorization": found}
        self.declaration = Declaration(heads=self.wire.heads, video=self.wire.video)
        if self.batch_size < 1 or self.concurrency < 1:
            raise ValueError(
                f"batch_size={self.batch_size} and concurrency={self.concurrency} must be 1 or more"
            )

    def check(self) -> None:
        """Connect to every server, which must be up when work begins: later it may be down for a while.

        Raises:
            RewardError: when none can be reached; where some can, the others are warned of.
        """
        workers = Workers(len(self.urls), "lacfast-reach")
        futures = {url: workers.submit(partial(reach, url, _REACH_S)) for url in self.urls}
        workers.close(wait_s=_REACH_S + 1)
        faults = {url: str(error) for url, future in futures.items() if (error := future.exception())}
        for url, fault in faults.items():
            log.warning("%s: %s", url, fault)
        if len(faults) == len(self.urls):
            told = "; ".join(f"{url}: {fault}" for url, fault in faults.items())
            raise RewardError(
                f"remote reward {self.name!r} has no server that answers: {told}; start it, or mend its URL"
            )

    def __call__(self, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Any:
        """(B,) float32 scores on the CPU, or a dict of them by the wire format's heads; no gradient.

        Args:
            images: (B, 3, H, W) float in [0, 1], or videos (B, F, 3, H, W) where the wire format has them.
            prompts: B of them.
            metadata: B of them.

        Raises:
            RewardError: when a batch is given up; it names the servers and what each of them last did.
        """
        images = images.detach().cpu()
        workers = Workers(len(self.urls) * self.concurrency, "lacfast-remote")
        self._calls.add(workers)
        try:
            futures = [
                workers.submit(
                    partial(
                        self._scored, workers.stopped, number, images[rows], prompts[rows], metadata[rows]
                    )
                )
                for number, first in enumerate(range(0, len(prompts), self.batch_size))
                for rows in [slice(first, first + self.batch_size)]
            ]
            # Of the batches that ended: one that was given up ends the call before the others are asked.
            for future in wait(futures, return_when=FIRST_EXCEPTION).done:
                future.result()
            rows = [row for future in futures for row in future.result()]
            scores = torch.tensor(rows, dtype=torch.float32)
            heads = self.wire.heads
            return dict(zip(heads, scores.unbind(dim=1), strict=True)) if heads else scores[:, 0]
        except CancelledError as error:
            raise RewardError(f"remote reward {self.name!r} was cancelled") from error
        finally:
            self._calls.discard(workers)
            workers.close(cancel=True, wait_s=0)

    def cancel(self) -> None:
        """End the calls that other threads have in work; each raises RewardError at once."""
        for workers in tuple(self._calls):
            workers.close(cancel=True, wait_s=0)

    def _scored(
        self,
        stopped: Event,
        number: int,
        images: Tensor,
        prompts: list[str],
        metadata: list[dict[str, Any]],
    ) -> list[tuple[float, ...]]:
        """The scores of batch `number`, from the first server that gives them."""
        body = self.wire.request(images, prompts, metadata)
        start, failures, bad_answers = self.clock(), 0, 0
        last_fault: dict[str, str] = {}
        for attempt in count():
            for url in self._order(number):
                if stopped.is_set():
                    raise CancelledError
                left = self.retry.give_up_s - (self.clock() - start)
                if failures and left <= 0:
                    waited = self.clock() - start
                    raise self._given_up(last_fault, f"{failures} failures in {waited:.1f} s", _LONGER)
                limit = min(self.retry.timeout_s, left) if failures else self.retry.timeout_s
                try:
                    scores = self._ask(url, body, len(prompts), limit)
                except (UnavailableError, BadAnswerError) as fault:
                    failures += 1
                    bad_answers += isinstance(fault, BadAnswerError)
                    last_fault[url] = str(fault)
                    self._avoid_until[url] = self.clock() + self.retry.max_backoff_s
                    log.warning("%s: %s (batch %d of %d images)", url, fault, number, len(prompts))
                else:
                    self._avoid_until.pop(url, None)
                    if failures:
                        waited = self.clock() - start
                        log.info(
                            "%s: batch %d scored after %d failures, %.1f s", url, number, failures, waited
                        )
                    return scores
                if bad_answers >= self.retry.max_bad_answers:
                    summary = f"{bad_answers} answers without usable scores"
                    raise self._given_up(last_fault, summary, "mend what they answer")
            pause_s = min(self.retry.backoff_s * 2.0 ** min(attempt, 60), self.retry.max_backoff_s)
            pause_s *= 1 - self.retry.jitter * self._random.random()
            waited = self.clock() - start
            if waited + pause_s > self.retry.give_up_s:
                raise self._given_up(last_fault, f"{failures} failures in {waited:.1f} s", _LONGER)
            log.warning("%s: batch %d is tried again in %.1f s", self.name, number, pause_s)
            self.pause(stopped, pause_s)
        raise AssertionError("unreachable")

    def _given_up(self, last_fault: Mapping[str, str], summary: str, remedy: str) -> RewardError:
        servers = "; ".join(f"{url}: {fault}" for url, fault in last_fault.items())
        return RewardError(f"remote reward {self.name!r} gave up after {summary}. {servers}; {remedy}")

    def _order(self, number: int) -> list[str]:
        """The servers to ask: batches take turns, and those that failed lately come last."""
        turn = number % len(self.urls)
        rotated = [*self.urls[turn:], *self.urls[:turn]]
        now = self.clock()
        return sorted(rotated, key=lambda url: self._avoid_until.get(url, -math.inf) > now)

    def _ask(self, url: str, body: bytes, expected: int, timeout_s: float) -> list[tuple[float, ...]]:
        """The scores of one request.

        Raises:
            UnavailableError: when the server cannot be reached, is slow or fails.
            BadAnswerError: when what it says is of no use.
        """
        own = {"Content-Type": self.wire.content_type, **self._credentials.get(url, {})}
        headers = {**own, **self.headers}
        status, answer = post(url, body, headers, timeout_s)
        if status >= 500 or status in _BUSY_STATUSES:
            raise UnavailableError(f"HTTP status {status}, {_last_line(answer)}")
        if status != 200:
            raise BadAnswerError(f"HTTP status {status}, {_last_line(answer)}")
        scores = self.wire.scores(answer)
        if len(scores) != expected:
            raise BadAnswerError(f"{len(scores)} scores for {expected} images")
        # Of NaN, too; what float32 cannot hold would be infinite to whoever learns from it.
        unusable = [score for row in scores for score in row if not abs(score) <= _MAX_SCORE]
        if unusable:
            raise BadAnswerError(f"a score is {unusable[0]}")
        return scores


def _last_line(answer: bytes) -> str:
    """The end of an error page: of a traceback, what went wrong."""
    lines = answer.decode("utf-8", "replace").strip().splitlines()
    return lines[-1][:200] if lines else "no text"
