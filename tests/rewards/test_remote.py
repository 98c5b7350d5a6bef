"""The remote reward survives servers that are down, slow, failing or wrong, and its log says which."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from refusals import Refusal
from reward_server import Answer, Server, right

from lacfast.rewards.queue import RewardQueue
from lacfast.rewards.registry import RewardSet
from lacfast.rewards.remote import RemoteReward, RetryConfig
from lacfast.rewards.reward import RewardError

IMAGES = torch.rand(5, 3, 4, 4, generator=torch.Generator().manual_seed(0))
PROMPTS = [str(number) for number in range(5)]
METADATA: list[dict[str, Any]] = [{} for _ in PROMPTS]


def failing(status: int = 500, text: str = "Traceback\nCUDA out of memory") -> Answer:
    return lambda prompts: (status, text.encode())


def scored(*scores: float) -> Answer:
    return lambda prompts: (200, json.dumps({"scores": scores}).encode())


def slow(prompts: list[str]) -> tuple[int, bytes]:
    time.sleep(0.5)
    return right(prompts)


@pytest.fixture
def start() -> Iterator[Callable[..., Server]]:
    servers: list[Server] = []

    def start(*answers: Answer, port: int = 0, then: Answer = right) -> Server:
        servers.append(Server(*answers, port=port, then=then))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


class Clock:
    """Time that passes in `pause` only."""

    def __init__(self, on_sleep: Callable[[float], None] = lambda now: None) -> None:
        self.now = 0.0
        self.pauses: list[float] = []
        self.on_sleep = on_sleep

    def pause(self, stopped: threading.Event, seconds: float) -> None:
        self.now += seconds
        self.pauses.append(seconds)
        self.on_sleep(self.now)


def remote(*urls: str, clock: Clock | None = None, batch_size: int = 64, **retry: Any) -> RemoteReward:
    clock = clock or Clock()
    settings = RetryConfig(**{"timeout_s": 5.0, "jitter": 0.0, **retry})
    return RemoteReward(
        urls=urls, retry=settings, batch_size=batch_size, pause=clock.pause, clock=lambda: clock.now
    )


def free_port() -> int:
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def read_request(connection: socket.socket) -> None:
    """All of it: closing a connection with unread bytes resets it, and loses the answer."""
    with connection.makefile("rb") as file:
        length = 0
        while (line := file.readline()) != b"\r\n":
            name, _, value = line.partition(b":")
            length = int(value) if name.lower() == b"content-length" else length
        file.read(length)


def test_scores_come_in_order_from_batches_of_the_given_size(start: Callable[..., Server]) -> None:
    server = start()
    metadata = [{"number": number} for number in range(5)]
    scores = remote(server.url, batch_size=2)(IMAGES, PROMPTS, metadata)
    assert scores.tolist() == [0.0, 1.0, 2.0, 3.0, 4.0]
    assert scores.dtype == torch.float32
    sizes = sorted(len(request["prompts"]) for request in server.requests)
    assert sizes == [1, 2, 2]
    assert all(
        [str(about["number"]) for about in request["metadata"]] == request["prompts"]
        for request in server.requests
    )


def test_a_server_that_is_down_for_20_seconds_loses_nothing(
    start: Callable[..., Server], caplog: pytest.LogCaptureFixture
) -> None:
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    servers: list[Server] = []

    def come_up(now: float) -> None:
        if now >= 20 and not servers:
            servers.append(start(port=port))

    clock = Clock(come_up)
    with caplog.at_level(logging.INFO, "lacfast.rewards.remote"):
        scores = remote(url, clock=clock)(IMAGES, PROMPTS, METADATA)
    assert scores.tolist() == [0.0, 1.0, 2.0, 3.0, 4.0]
    assert clock.pauses == [0.5, 1.0, 2.0, 4.0, 8.0, 16.0]
    lines = [record.getMessage() for record in caplog.records]
    assert lines[0].startswith(f"{url}: ConnectionRefusedError: ")
    assert lines[1] == "remote: batch 0 is tried again in 0.5 s"
    assert lines[-1] == f"{url}: batch 0 scored after 6 failures, 31.5 s"


@pytest.mark.parametrize(
    ("answer", "line"),
    [
        (failing(), "HTTP status 500, CUDA out of memory"),
        (failing(503, ""), "HTTP status 503, no text"),
        (failing(429), "HTTP status 429"),
        (failing(404, "not here"), "HTTP status 404, not here"),
        (scored(1, 2), "2 scores for 5 images"),
        (scored(1, 2, float("nan"), 4, 5), "a score is nan"),
        (scored(1, 2, float("-inf"), 4, 5), "a score is -inf"),
        (scored(1, 2, 1e300, 4, 5), "a score is 1e+300"),
        (scored(1, 2, 10**400, 4, 5), "a score is an integer beyond all floats"),
        (lambda prompts: (200, b"[" * 99_999), "the answer is no JSON"),
        (lambda prompts: (200, b"<html>"), "the answer is no JSON"),
    ],
)
def test_a_fault_is_logged_and_the_batch_is_asked_again(
    start: Callable[..., Server], caplog: pytest.LogCaptureFixture, answer: Answer, line: str
) -> None:
    server = start(answer)
    assert remote(server.url)(IMAGES, PROMPTS, METADATA).tolist() == [0.0, 1.0, 2.0, 3.0, 4.0]
    assert server.requests[0] == server.requests[1]
    assert f"{server.url}: {line}" in caplog.text
    assert "(batch 0 of 5 images)" in caplog.text


def test_a_slow_server_is_given_up_after_the_time_limit(
    start: Callable[..., Server], caplog: pytest.LogCaptureFixture
) -> None:
    server = start(slow)
    scores = remote(server.url, timeout_s=0.1)(IMAGES, PROMPTS, METADATA)
    assert scores.tolist() == [0.0, 1.0, 2.0, 3.0, 4.0]
    assert "no whole answer within 0.1 s" in caplog.text


def test_a_server_that_drips_is_slow(caplog: pytest.LogCaptureFixture) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as listener:

        def drip() -> None:
            connection, _ = listener.accept()
            with closing(connection):
                read_request(connection)
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
                # Until the client hangs up.
                with suppress(OSError):
                    for _ in range(20):
                        connection.sendall(b" ")
                        time.sleep(0.05)

        thread = threading.Thread(target=drip)
        thread.start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        with Refusal(
            "no whole answer within 0.2 s",
            cause="A server that takes longer over one answer than `RetryConfig.timeout_s`.",
            remedy="wait longer by RetryConfig(timeout_s=..., give_up_s=...)",
            error=RewardError,
        ).raised():
            remote(url, timeout_s=0.2, give_up_s=0.0)(IMAGES, PROMPTS, METADATA)
        thread.join()


@pytest.mark.parametrize(
    ("opening", "drop"),
    [(b"", b"HTTP/1.1 100 Continue\r\n\r\n"), (b"HTTP/1.1 200 OK\r\n", b"X"), (b"", b"H")],
)
def test_a_deadline_holds_for_continues_and_slow_headers(opening: bytes, drop: bytes) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as listener:

        def drip() -> None:
            connection, _ = listener.accept()
            with closing(connection), suppress(OSError):
                read_request(connection)
                connection.sendall(opening)
                for _ in range(60):
                    connection.sendall(drop)
                    time.sleep(0.05)

        thread = threading.Thread(target=drip)
        thread.start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        start = time.monotonic()
        with pytest.raises(RewardError, match=r"no whole answer within 0\.2 s"):
            remote(url, timeout_s=0.2, give_up_s=0.0)(IMAGES, PROMPTS, METADATA)
        assert time.monotonic() - start < 2
        thread.join()


def test_a_deadline_holds_for_a_resolver_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    release = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: release.wait(10))
    start = time.monotonic()
    with pytest.raises(RewardError, match=r"no whole answer within 0\.2 s"):
        remote("http://host.invalid/score", timeout_s=0.2, give_up_s=0.0)(IMAGES, PROMPTS, METADATA)
    assert time.monotonic() - start < 2
    release.set()


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Key and certificate of localhost, signed by nobody else."""
    if shutil.which("openssl") is None:
        pytest.skip("needs openssl")
    path = tmp_path_factory.mktemp("tls") / "localhost.pem"
    make = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    subject = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost", "-days", "2"]
    files = ["-keyout", str(path), "-out", str(path.with_suffix(".crt"))]
    subprocess.run([*make, *subject, *files], check=True, capture_output=True)
    path.write_text(path.read_text() + path.with_suffix(".crt").read_text())
    return path


def test_https_speaks_to_a_server_whose_certificate_is_trusted_only(
    start: Callable[..., Server], certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, context = start(), ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    server.http.socket = context.wrap_socket(server.http.socket, server_side=True)
    port = server.http.server_port
    with Refusal(
        "its certificate is not trusted: self",
        cause="A reward server whose certificate no known authority has signed.",
        remedy="name a file that vouches for it in SSL_CERT_FILE",
        error=RewardError,
    ).raised():
        remote(f"https://localhost:{port}/score")(IMAGES, PROMPTS, METADATA)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    scores = remote(f"https://localhost:{port}/score")(IMAGES, PROMPTS, METADATA)
    assert scores.tolist() == [0.0, 1.0, 2.0, 3.0, 4.0]
    with Refusal(
        "not valid for '127",
        cause="A reward server under another name than its certificate's.",
        remedy="name a file that vouches for it in SSL_CERT_FILE",
        error=RewardError,
    ).raised():
        remote(f"https://127.0.0.1:{port}/score")(IMAGES, PROMPTS, METADATA)


@pytest.mark.parametrize("status", [200, 500])
def test_an_answer_without_end_is_refused(start: Callable[..., Server], status: int) -> None:
    server = start(then=lambda prompts: (status, b" " * (5 * 2**20)))
    with Refusal(
        "the answer is longer than 4194304 bytes",
        cause="A server that sends something else than scores.",
        remedy="mend what they answer",
        error=RewardError,
    ).raised():
        remote(server.url)(IMAGES, PROMPTS, METADATA)


def test_a_password_in_a_url_is_refused_and_not_shown() -> None:
    refusal = Refusal(
        "has a user name or a password in it",
        cause="Credentials in a reward server's URL.",
        remedy="write it into ~/.netrc, or pass RemoteReward(headers={'Authorization': ...})",
    )
    with refusal.raised() as caught:
        RemoteReward(urls=["http://me:secret@host:80/score"])
    assert "secret" not in str(caught.value)


def test_credentials_are_sent_and_never_shown(
    start: Callable[..., Server],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login bearer password secret\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    server = start(failing(401, "who are you?"))
    rewards = RewardSet.create(f"taste={server.url}")
    assert rewards.names == ["taste"]
    rewards.score(IMAGES, PROMPTS, METADATA)
    assert [headers["Authorization"] for headers in server.headers] == ["Bearer secret"] * 2
    # What is said in Python counts more than the file.
    given = RemoteReward(urls=[server.url], headers={"authorization": "Basic other"})
    given(IMAGES, PROMPTS, METADATA)
    sent = [value for name, value in server.headers[-1].items() if name.lower() == "authorization"]
    assert sent == ["Basic other"]
    for shown in (repr(rewards), repr(given), caplog.text):
        assert "secret" not in shown
        assert "other" not in shown


def test_a_run_begins_only_with_a_server_that_answers(
    start: Callable[..., Server], caplog: pytest.LogCaptureFixture
) -> None:
    up, down = start().url, f"http://127.0.0.1:{free_port()}"
    remote(up, down).check()
    assert f"{down}: ConnectionRefusedError" in caplog.text
    with Refusal(
        "has no server that answers: http://127.0.0.1:",
        cause="A reward server that is not running, or another address.",
        remedy="start it, or mend its URL",
        error=RewardError,
    ).raised():
        RewardSet.create(f"taste={down}").prepared()


def test_an_answer_that_breaks_off_is_asked_for_again() -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as listener:

        def break_off() -> None:
            connection, _ = listener.accept()
            with closing(connection):
                read_request(connection)
                connection.sendall(
                    b'HTTP/1.1 200 OK\r\nContent-Length: 90\r\n\r\n{"scores": [1, 2, 3, 4, 5]}'
                )

        thread = threading.Thread(target=break_off)
        thread.start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        with Refusal(
            "the connection ended within the answer",
            cause="A server that dies while it answers.",
            remedy="start them, or wait longer",
            error=RewardError,
        ).raised():
            remote(url, give_up_s=0.0)(IMAGES, PROMPTS, METADATA)
        thread.join()


def test_batches_take_turns_and_another_server_takes_over(start: Callable[..., Server]) -> None:
    clock = Clock()
    broken, healthy = start(*[failing()] * 9), start()
    reward = remote(broken.url, healthy.url, batch_size=1, clock=clock)
    assert reward(IMAGES, PROMPTS, METADATA).tolist() == [0.0, 1.0, 2.0, 3.0, 4.0]
    assert len(healthy.requests) == 5
    assert clock.pauses == []
    before = len(broken.requests)
    reward(IMAGES, PROMPTS, METADATA)
    assert len(broken.requests) == before, "a server that failed lately is asked last"
    clock.now += 31
    broken.answers.clear()
    reward(IMAGES, PROMPTS, METADATA)
    assert len(broken.requests) > before, "later it is asked again"


def test_giving_up_names_every_server_and_what_it_last_did(start: Callable[..., Server]) -> None:
    failed, wrong = start(*[failing()] * 99), start(*[scored(1.0)] * 99)
    with pytest.raises(RewardError) as caught:
        remote(failed.url, wrong.url)(IMAGES, PROMPTS, METADATA)
    assert str(caught.value) == (
        "remote reward 'remote' gave up after 3 answers without usable scores. "
        f"{failed.url}: HTTP status 500, CUDA out of memory; {wrong.url}: 1 scores for 5 images; "
        "mend what they answer"
    )


def test_a_server_that_stays_down_is_given_up_in_time() -> None:
    clock = Clock()
    url = f"http://127.0.0.1:{free_port()}"
    refusal = Refusal(
        "ConnectionRefusedError",
        cause="A reward server that is down for longer than `RetryConfig.give_up_s`.",
        remedy="start them, or wait longer by RetryConfig(timeout_s=..., give_up_s=...)",
        error=RewardError,
    )
    with refusal.raised() as caught:
        remote(url, clock=clock, give_up_s=100.0)(IMAGES, PROMPTS, METADATA)
    assert re.search(r"gave up after \d+ failures in .*127.0.0.1", str(caught.value))
    assert 60 < clock.now <= 100
    assert max(clock.pauses) == 30.0


def test_no_batch_is_asked_for_after_one_is_given_up(start: Callable[..., Server]) -> None:
    server = start(*[failing(404)] * 99)
    with Refusal(
        "gave up after 3 answers without usable scores",
        cause="A server that answers with errors, or with other things than a number per image.",
        remedy="mend what they answer",
        error=RewardError,
    ).raised():
        remote(server.url, batch_size=1)(IMAGES, PROMPTS, METADATA)
    time.sleep(0.2)
    # The next one may have begun before the first was given up.
    assert len(server.requests) <= 4


@contextmanager
def silent_server() -> Iterator[str]:
    """The URL of a server that lets everybody in and never says a word."""
    with closing(socket.create_server(("127.0.0.1", 0))) as listener:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


@contextmanager
def dead_server() -> Iterator[str]:
    yield f"http://127.0.0.1:{free_port()}"


def score_aside(rewards: RewardSet) -> None:
    """As an iteration of the trainer does it."""
    with RewardQueue(rewards) as queue:
        queue.submit(IMAGES, PROMPTS, METADATA)
        queue.close()


@pytest.mark.parametrize("server", [silent_server, dead_server])
def test_one_interrupt_ends_a_run_within_seconds(
    server: Callable[[], AbstractContextManager[str]],
) -> None:
    with server() as url:
        rewards = RewardSet.create(RemoteReward(urls=[url], retry=RetryConfig(give_up_s=20, timeout_s=20)))
        interrupt = threading.Timer(0.3, os.kill, [os.getpid(), signal.SIGINT])
        start = time.monotonic()
        interrupt.start()
        with pytest.raises(KeyboardInterrupt):
            score_aside(rewards)
        assert time.monotonic() - start < 3
    ours = [thread for thread in threading.enumerate() if thread.name.startswith("lacfast-re")]
    assert all(thread.daemon for thread in ours), "they would be waited for when the process ends"


def test_jitter_shortens_pauses_by_at_most_its_share() -> None:
    clock = Clock()
    with pytest.raises(RewardError):
        remote(f"http://127.0.0.1:{free_port()}", clock=clock, jitter=0.5)(IMAGES, PROMPTS, METADATA)
    full = [min(0.5 * 2**attempt, 30.0) for attempt in range(len(clock.pauses))]
    shares = [pause / whole for pause, whole in zip(clock.pauses, full, strict=True)]
    assert all(0.5 <= share <= 1.0 for share in shares)
    assert len(set(shares)) > 1


def test_a_url_is_a_reward_by_itself(start: Callable[..., Server]) -> None:
    server = start()
    rewards = RewardSet.create({server.url: 2.0})
    assert rewards.score(IMAGES, PROMPTS, METADATA)[server.url].tolist() == [0.0, 1.0, 2.0, 3.0, 4.0]


def test_headers_reach_the_server(start: Callable[..., Server]) -> None:
    server = start()
    RemoteReward(urls=[server.url], headers={"Authorization": "Bearer key"})(IMAGES, PROMPTS, METADATA)
    assert server.headers[0]["Authorization"] == "Bearer key"
    assert server.headers[0]["Content-Type"] == "application/json"


@pytest.mark.parametrize(
    ("settings", "refusal"),
    [
        (
            {"urls": []},
            Refusal(
                "urls=[]",
                cause="A remote reward without a server.",
                remedy="pass a list of at least one server",
            ),
        ),
        (
            {"urls": "http://host"},
            Refusal(
                "urls='http://host'",
                cause="One URL in the place of several.",
                remedy="pass a list of at least one server",
            ),
        ),
        (
            {"urls": ["host:80"]},
            Refusal(
                "'host:80' is no server",
                cause="A server's URL without its protocol.",
                remedy="write http://host:port/path",
            ),
        ),
        (
            {"urls": ["http://host:port"]},
            Refusal(
                "'http://host:port' is no server",
                cause="A port that is no number.",
                remedy="write http://host:port/path",
            ),
        ),
        (
            {"urls": ["http://host"], "batch_size": 0},
            Refusal(
                "batch_size=0",
                cause="Requests without images.",
                remedy="must be 1 or more",
            ),
        ),
        (
            {"urls": ["http://host"], "concurrency": 0},
            Refusal(
                "concurrency=0",
                cause="A server that may never be asked.",
                remedy="must be 1 or more",
            ),
        ),
    ],
)
def test_unusable_settings_are_refused(settings: dict[str, Any], refusal: Refusal) -> None:
    with refusal.raised():
        RemoteReward(**settings)


@pytest.mark.parametrize(
    "settings",
    [{"timeout_s": 0}, {"backoff_s": -1}, {"jitter": 2}, {"give_up_s": -1}, {"max_bad_answers": 0}],
)
def test_unusable_retry_settings_are_refused(settings: dict[str, Any]) -> None:
    (name,) = settings
    with pytest.raises(ValueError, match=f"{name}={settings[name]}"):
        RetryConfig(**settings)
