"""A reward on other machines: batches over HTTP, with time limits, retries and several servers."""

from __future__ import annotations

import http.client
import io
import logging
import math
import random
import socket
import ssl
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
from lacfast.rewards.reward import BadAnswerError, RewardError
from lacfast.rewards.wire import JSONFormat, WireFormat
from lacfast.rewards.workers import Workers

log = logging.getLogger(__name__)

_BUSY_STATUSES = {408, 425, 429}
_MAX_ANSWER_BYTES = 4 * 2**20
_CHUNK_BYTES = 2**16
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


class _UnavailableError(Exception):
    """A server could not be reached, took too long or said that it failed."""


@dataclass(kw_only=True, eq=False)
class RemoteReward:
    """Scores from HTTP servers. Each batch goes to one of them; what one cannot do, the next one does."""

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
    """Further headers of every request, such as Authorization."""
    pause: Callable[[Event, float], object] = field(default=Event.wait, repr=False)
    """Waits some seconds or for the event; tests put in their own."""
    clock: Callable[[], float] = field(default=time.monotonic, repr=False)
    """Seconds; tests put in their own."""
    _calls: set[Workers] = field(default_factory=set, init=False, repr=False)
    _avoid_until: dict[str, float] = field(default_factory=dict, init=False, repr=False)
    # Not the global generator: retries must not change what a seeded run draws.
    _random: random.Random = field(default_factory=random.Random, init=False, repr=False)

    def __post_init__(self) -> None:
        if isinstance(self.urls, str) or not self.urls:
            raise ValueError(f"urls={self.urls!r}; pass a list of at least one server")
        for url in self.urls:
            parts = urlsplit(url)
            if "@" in parts.netloc:
                shown = f"{parts.scheme}://...@{parts.netloc.rpartition('@')[2]}"
                raise ValueError(
                    f"{shown} has a user name or a password in it, which logs would show and nothing sends; "
                    "leave it out and pass RemoteReward(headers={'Authorization': ...})"
                )
            if parts.scheme not in ("http", "https") or not parts.hostname or not _has_port(url):
                raise ValueError(f"{url!r} is no server; write http://host:port/path")
        if self.batch_size < 1 or self.concurrency < 1:
            raise ValueError(
                f"batch_size={self.batch_size} and concurrency={self.concurrency} must be 1 or more"
            )

    def __call__(self, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
        """(B,) float32 scores on the CPU; no gradient.

        Args:
            images: (B, 3, H, W) float in [0, 1].
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
            return torch.tensor([score for future in futures for score in future.result()]).float()
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
    ) -> list[float]:
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
                    raise self._given_up(last_fault, f"{failures} failures in {waited:.1f} s")
                limit = min(self.retry.timeout_s, left) if failures else self.retry.timeout_s
                try:
                    scores = self._ask(url, body, len(prompts), limit)
                except (_UnavailableError, BadAnswerError) as fault:
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
                    raise self._given_up(last_fault, f"{bad_answers} answers without usable scores")
            pause_s = min(self.retry.backoff_s * 2.0 ** min(attempt, 60), self.retry.max_backoff_s)
            pause_s *= 1 - self.retry.jitter * self._random.random()
            waited = self.clock() - start
            if waited + pause_s > self.retry.give_up_s:
                raise self._given_up(last_fault, f"{failures} failures in {waited:.1f} s")
            log.warning("%s: batch %d is tried again in %.1f s", self.name, number, pause_s)
            self.pause(stopped, pause_s)
        raise AssertionError("unreachable")

    def _given_up(self, last_fault: Mapping[str, str], summary: str) -> RewardError:
        servers = "; ".join(f"{url}: {fault}" for url, fault in last_fault.items())
        return RewardError(f"remote reward {self.name!r} gave up after {summary}. {servers}")

    def _order(self, number: int) -> list[str]:
        """The servers to ask: batches take turns, and those that failed lately come last."""
        turn = number % len(self.urls)
        rotated = [*self.urls[turn:], *self.urls[:turn]]
        now = self.clock()
        return sorted(rotated, key=lambda url: self._avoid_until.get(url, -math.inf) > now)

    def _ask(self, url: str, body: bytes, expected: int, timeout_s: float) -> list[float]:
        """The scores of one request.

        Raises:
            _UnavailableError: when the server cannot be reached, is slow or fails.
            BadAnswerError: when what it says is of no use.
        """
        status, answer = _post(url, body, {"Content-Type": self.wire.content_type, **self.headers}, timeout_s)
        if status >= 500 or status in _BUSY_STATUSES:
            raise _UnavailableError(f"HTTP status {status}, {_last_line(answer)}")
        if status != 200:
            raise BadAnswerError(f"HTTP status {status}, {_last_line(answer)}")
        scores = self.wire.scores(answer)
        if len(scores) != expected:
            raise BadAnswerError(f"{len(scores)} scores for {expected} images")
        # Of NaN, too; what float32 cannot hold would be infinite to whoever learns from it.
        unusable = [score for score in scores if not abs(score) <= _MAX_SCORE]
        if unusable:
            raise BadAnswerError(f"a score is {unusable[0]}")
        return scores


class _TooLongError(Exception):
    """More bytes than any scores need. No ValueError, which http.client would take for its own."""


class _BoundedSocket(io.RawIOBase):
    """One deadline and budget of bytes over an exchange: a socket's own limit starts anew with each byte."""

    def __init__(self, connected: socket.socket, deadline: float) -> None:
        self.socket = connected
        self.deadline = deadline
        self.left = _MAX_ANSWER_BYTES

    def sendall(self, message: bytes) -> None:
        rest = memoryview(message)
        while rest:
            self.socket.settimeout(_left(self.deadline))
            rest = rest[self.socket.send(rest[:_CHUNK_BYTES]) :]

    def makefile(self, mode: str) -> io.BufferedReader:
        return io.BufferedReader(self)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self.socket.settimeout(_left(self.deadline))
        count = self.socket.recv_into(buffer)
        self.left -= count
        if self.left < 0:
            raise _TooLongError
        return count

    def close(self) -> None:
        """Nothing: http.client closes its socket while the answer is still being read."""


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


def _addresses(host: str, port: int, deadline: float) -> list[Any]:
    # The system's resolver has no time limit, so it may be left behind.
    resolver = Workers(1, "lacfast-resolver")
    found = resolver.submit(partial(socket.getaddrinfo, host, port, type=socket.SOCK_STREAM))
    try:
        return found.result(_left(deadline))
    finally:
        resolver.close(cancel=True, wait_s=0)


def _connected(host: str, port: int, *, tls: bool, deadline: float) -> socket.socket:
    fault: OSError = OSError(f"{host} has no address")
    for *_, address in _addresses(host, port, deadline):
        try:
            connected = socket.create_connection(address[:2], timeout=_left(deadline))
        except OSError as error:
            fault = error
        else:
            connected.settimeout(_left(deadline))
            return (
                ssl.create_default_context().wrap_socket(connected, server_hostname=host)
                if tls
                else connected
            )
    raise fault


def _post(url: str, body: bytes, headers: Mapping[str, str], timeout_s: float) -> tuple[int, bytes]:
    """Status and body of the answer to a POST request, all within `timeout_s`."""
    parts = urlsplit(url)
    deadline, tls = time.monotonic() + timeout_s, parts.scheme == "https"
    host = str(parts.hostname)
    connection = (http.client.HTTPSConnection if tls else http.client.HTTPConnection)(host, parts.port)
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    connected = None
    try:
        connected = _connected(host, parts.port or connection.default_port, tls=tls, deadline=deadline)
        connection.sock = _BoundedSocket(connected, deadline)
        connection.request("POST", path, body, dict(headers))
        response = connection.getresponse()
        answer = bytearray()
        while chunk := response.read1(_CHUNK_BYTES):
            answer += chunk
        if response.length:
            raise _UnavailableError("the connection ended within the answer")
        return response.status, bytes(answer)
    except _TooLongError as error:
        raise BadAnswerError(f"the answer is longer than {_MAX_ANSWER_BYTES} bytes") from error
    except TimeoutError as error:
        raise _UnavailableError(f"no whole answer within {timeout_s:g} s") from error
    except ssl.SSLCertVerificationError as error:
        raise BadAnswerError(
            f"its certificate is not trusted: {error.verify_message}; "
            "name a file that vouches for it in SSL_CERT_FILE"
        ) from error
    except (OSError, http.client.HTTPException) as error:
        raise _UnavailableError(f"{type(error).__name__}: {error}") from error
    finally:
        if connected is not None:
            connected.close()


def _has_port(url: str) -> bool:
    """Whether the port is a number, or the scheme's own."""
    try:
        return urlsplit(url).port != 0
    except ValueError:
        return False


def _last_line(answer: bytes) -> str:
    """The end of an error page: of a traceback, what went wrong."""
    lines = answer.decode("utf-8", "replace").strip().splitlines()
    return lines[-1][:200] if lines else "no text"
