"""A reward server of tests, on this machine, in a thread."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = Callable[[list[str]], tuple[int, bytes]]


def right(prompts: list[str]) -> tuple[int, bytes]:
    """Every prompt is a number, and so is its score."""
    return 200, json.dumps({"scores": [float(prompt) for prompt in prompts]}).encode()


class Server:
    """A reward server on this machine that answers as told, then by `then`."""

    def __init__(self, *answers: Answer, port: int = 0, then: Answer = right) -> None:
        self.answers = list(answers)
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                message = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                server.requests.append(message)
                server.headers.append(dict(self.headers))
                answer = server.answers.pop(0) if server.answers else then
                status, body = answer(message["prompts"])
                try:
                    self.send_response(status)
                    self.send_header("Content-Length", str(len(body)))
                    self.end_headers()
                    self.wfile.write(body)
                except OSError:
                    server.answers.clear()  # the client has given up waiting

            def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
                """Not on the test's screen."""

        self.http = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/score"
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()

    def close(self) -> None:
        self.http.shutdown()
        self.http.server_close()
