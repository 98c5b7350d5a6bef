"""The page of a run on this machine's own address, made anew while the run goes on."""

from __future__ import annotations

import secrets
import sys
import threading
from html import escape
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import resources
from pathlib import Path
from typing import Any

from lacfast.report.page import fill
from lacfast.report.progress import METRICS, read_run
from lacfast.report.run import NothingYetError, render_run

HOST = "127.0.0.1"
"""Nobody else on the network reads it; `ssh -L` brings it to another machine."""


class RunServer(ThreadingHTTPServer):
    """Answers / with the page of a run, /stamp with a word that changes when there is more to see."""

    daemon_threads = True

    def __init__(self, directory: Path, port: int) -> None:
        """
        Args:
            directory: of a run.
            port: 0 takes one that is free.

        Raises:
            ValueError: when there is no run, or the port is taken.
        """
        read_run(directory)
        self.directory = directory
        self._page: tuple[str, str] = ("", "")
        self._lock = threading.Lock()
        try:
            super().__init__((HOST, port), _Handler)
        except OSError as error:
            raise ValueError(
                f"--port {port} cannot be used: {error.strerror}; choose another, or 0"
            ) from error
        try:
            self.page()
        except ValueError:
            self.server_close()
            raise

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A reader that leaves before the page has arrived is no error."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)

    @property
    def address(self) -> str:
        return f"http://{HOST}:{self.server_port}/"

    def stamp(self) -> str:
        """Differs when the metrics or the pictures do."""
        files = [self.directory / METRICS, *(self.directory / "samples").glob("*.png")]
        found = [path.stat() for path in files if path.exists()]
        return f"{max((each.st_mtime_ns for each in found), default=0)}-{sum(each.st_size for each in found)}"

    def page(self) -> str:
        """The page of now, which is drawn once for every stamp; before the first iteration one that waits."""
        with self._lock:
            stamp = self.stamp()
            if self._page[0] != stamp:
                try:
                    self._page = (stamp, render_run(self.directory))
                except NothingYetError:
                    name = escape(self.directory.resolve().name)
                    self._page = (stamp, fill("waiting.html", name=name))
            return self._page[1]


class _Handler(BaseHTTPRequestHandler):
    server: RunServer

    def do_GET(self) -> None:
        # A page of the web that resolves its own name to this address reads nothing.
        host = (self.headers.get("Host") or "").partition(":")[0]
        if host not in (HOST, "localhost"):
            self._answer(403, "text/plain", "this page is for its own machine")
        elif self.path == "/":
            nonce = secrets.token_urlsafe(12)
            script = resources.files("lacfast.report").joinpath("renew.js").read_text(encoding="utf-8")
            script = f'<script nonce="{nonce}">{script}</script></body>'
            self._answer(200, "text/html", self.server.page().replace("</body>", script), nonce)
        elif self.path == "/stamp":
            self._answer(200, "text/plain", self.server.stamp())
        else:
            self._answer(404, "text/plain", "there is / and /stamp")

    def _answer(self, code: int, kind: str, text: str, nonce: str = "") -> None:
        body = text.encode("utf-8")
        self.send_response(code)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.send_header(
            "Content-Security-Policy",
            "default-src 'none'; img-src data:; style-src 'unsafe-inline'; connect-src 'self'; "
            "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
            + (f"; script-src 'nonce-{nonce}'" if nonce else ""),
        )
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class's name
        """A line per request would cover what the command says."""


def serve(server: RunServer) -> None:
    """Answer until Ctrl-C, which is how it ends."""
    try:
        server.serve_forever(poll_interval=0.2)
    except KeyboardInterrupt:
        return
    finally:
        server.server_close()
