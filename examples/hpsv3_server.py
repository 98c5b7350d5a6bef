"""Serve HPSv3 (arXiv 2508.03789) to `RemoteReward`, in an environment of its own: [port] [device].

HPSv3 reads its score from a head on Qwen2-VL, so that no chat server has it. Install MizzenAI/HPSv3 as it
says, run this beside the trainer, and train on "hpsv3=http://127.0.0.1:18087". It needs nothing of lacfast.
"""

import base64
import json
import sys
import tempfile
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import torch
from hpsv3 import HPSv3RewardInferencer


def handler(judge: Any) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            try:
                status, answer = 200, json.dumps({"scores": scores(judge, request)})
            except Exception as error:
                status, answer = 500, f"{type(error).__name__}: {error}"
            body = answer.encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    return Handler


@torch.no_grad()
def scores(judge: Any, request: dict[str, Any]) -> list[float]:
    """The mean of each image's score; the head's second number is its deviation."""
    with tempfile.TemporaryDirectory() as folder:
        paths = [
            Path(folder) / f"{number}.{request['image_format']}" for number in range(len(request["images"]))
        ]
        for path, image in zip(paths, request["images"], strict=True):
            path.write_bytes(base64.b64decode(image))
        found = judge.reward(image_paths=[str(path) for path in paths], prompts=request["prompts"])
    return [float(score[0]) for score in found]


if __name__ == "__main__":
    given = dict(enumerate(sys.argv))
    inferencer = HPSv3RewardInferencer(device=given.get(2, "cuda"))
    # One batch at a time: the model has one GPU.
    HTTPServer(("127.0.0.1", int(given.get(1, 18087))), handler(inferencer)).serve_forever()
