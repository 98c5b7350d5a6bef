"""A chat server of tests, on this machine, in a thread: the part of OpenAI's API that a judge uses."""

from __future__ import annotations

import json
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = tuple[int, bytes]
"""Status and body."""


def said(text: str | None, end: str = "stop") -> Answer:
    """An answer in which the model says `text`."""
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": end}
    return 200, json.dumps({"object": "chat.completion", "choices": [choice]}).encode()


class ChatServer:
    """Gives `answers` in turn, then `then`; without it every prompt is a number, and so is its score."""

    def __init__(self) -> None:
        self.answers: list[Answer] = []
        self.then: Answer | None = None
        self.delay_s = 0.0
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.paths: list[str] = []
        self.most_at_once = 0
        self._at_once = 0
        self._lock = threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                message = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                status, body = server._answer(message, dict(self.headers), self.path)
                try:
                    self.send_response(status)
                    self.send_header("Content-Length", str(len(body)))
                    self.end_headers()
                    self.wfile.write(body)
                except OSError:
                    server.answers.clear()  # the client has given up waiting

            def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
                """Not on the test's screen."""

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()

    def _answer(self, message: dict[str, Any], headers: dict[str, str], path: str) -> Answer:
        with self._lock:
            self.requests.append(message)
            self.headers.append(headers)
            self.paths.append(path)
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
        time.sleep(self.delay_s)
        with self._lock:
            self._at_once -= 1
            if self.answers:
                return self.answers.pop(0)
        if self.then is not None:
            return self.then
        question = message["messages"][0]["content"][-1]["text"]
        prompt = re.search(r"Prompt: (\d+)", question)
        assert prompt
        return said(json.dumps({"score": float(prompt[1])}))

    def close(self) -> None:
        self.http.shutdown()
        self.http.server_close()
