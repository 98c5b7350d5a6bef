"""One HTTP exchange with a reward server: one deadline for all of it, and a bound on what it may send."""

from __future__ import annotations

import http.client
import io
import socket
import ssl
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from functools import partial
from typing import Any
from urllib.parse import urlsplit

from lacfast.rewards.reward import BadAnswerError
from lacfast.rewards.workers import Workers

_MAX_ANSWER_BYTES = 4 * 2**20
_CHUNK_BYTES = 2**16


class UnavailableError(Exception):
    """A server could not be reached, took too long or said that it failed."""


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
            continue
        if not tls:
            return connected
        try:
            connected.settimeout(_left(deadline))
            return ssl.create_default_context().wrap_socket(connected, server_hostname=host)
        except BaseException:
            connected.close()
            raise
    raise fault


def reach(url: str, timeout_s: float) -> None:
    """Connect to a server, with TLS where it speaks it, and hang up.

    Raises:
        UnavailableError: when that cannot be done.
        BadAnswerError: for a certificate that is not trusted.
    """
    parts = urlsplit(url)
    tls = parts.scheme == "https"
    port = parts.port or (443 if tls else 80)
    with _faults_of(timeout_s):
        deadline = time.monotonic() + timeout_s
        _connected(str(parts.hostname), port, tls=tls, deadline=deadline).close()


@contextmanager
def _faults_of(timeout_s: float) -> Iterator[None]:
    """What goes wrong in the block as one of the two errors of a reward server."""
    try:
        yield
    except _TooLongError as error:
        raise BadAnswerError(f"the answer is longer than {_MAX_ANSWER_BYTES} bytes") from error
    except TimeoutError as error:
        raise UnavailableError(f"no whole answer within {timeout_s:g} s") from error
    except ssl.SSLCertVerificationError as error:
        raise BadAnswerError(
            f"its certificate is not trusted: {error.verify_message}; "
            "name a file that vouches for it in SSL_CERT_FILE"
        ) from error
    except (OSError, http.client.HTTPException) as error:
        raise UnavailableError(f"{type(error).__name__}: {error}") from error


def post(url: str, body: bytes, headers: Mapping[str, str], timeout_s: float) -> tuple[int, bytes]:
    """Status and body of the answer to a POST request, all within `timeout_s`.

    Raises:
        UnavailableError: when the server cannot be reached, is slow or hangs up.
        BadAnswerError: for a certificate that is not trusted, or an answer longer than 4 MiB.
    """
    parts = urlsplit(url)
    deadline, tls = time.monotonic() + timeout_s, parts.scheme == "https"
    host = str(parts.hostname)
    connection = (http.client.HTTPSConnection if tls else http.client.HTTPConnection)(host, parts.port)
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    with (
        _faults_of(timeout_s),
        closing(
            _connected(host, parts.port or connection.default_port, tls=tls, deadline=deadline)
        ) as connected,
    ):
        connection.sock = _BoundedSocket(connected, deadline)
        connection.request("POST", path, body, dict(headers))
        response = connection.getresponse()
        answer = bytearray()
        while chunk := response.read1(_CHUNK_BYTES):
            answer += chunk
        if response.length:
            raise UnavailableError("the connection ended within the answer")
    return response.status, bytes(answer)
