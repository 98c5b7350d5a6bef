"""The example that serves HPSv3 speaks our JSON; HPSv3 itself is a stand-in here."""

from __future__ import annotations

import importlib.util
import sys
import threading
from http.server import HTTPServer
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from lacfast.rewards.registry import RewardSet
from lacfast.rewards.remote import RemoteReward, RetryConfig
from lacfast.rewards.reward import RewardError

EXAMPLE = Path(__file__).parents[2] / "examples" / "hpsv3_server.py"


class Inferencer:
    """With HPSv3's interface: mean and deviation of each image's score."""

    def reward(self, image_paths: list[str], prompts: list[str]) -> torch.Tensor:
        if "broken" in prompts:
            raise RuntimeError("CUDA out of memory")
        levels = [float(np.asarray(Image.open(path)).mean()) for path in image_paths]
        return torch.tensor([[level, -1.0] for level in levels])


def test_the_example_serves_hpsv3_to_a_remote_reward(monkeypatch: pytest.MonkeyPatch) -> None:
    package: Any = ModuleType("hpsv3")
    package.HPSv3RewardInferencer = Inferencer
    monkeypatch.setitem(sys.modules, "hpsv3", package)
    spec = importlib.util.spec_from_file_location("hpsv3_server", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    example: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    kind = example.handler(Inferencer())
    kind.log_message = lambda *arguments: None
    server = HTTPServer(("127.0.0.1", 0), kind)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        images = torch.stack([torch.full((3, 4, 4), level / 255) for level in (51.0, 102.0)])
        reward = RemoteReward(
            name="hpsv3",
            urls=[f"http://127.0.0.1:{server.server_port}"],
            retry=RetryConfig(give_up_s=0.0, timeout_s=5.0),
        )
        scores = RewardSet.create(reward).score(images, ["a", "b"], [{}, {}])
        assert scores["hpsv3"].tolist() == [51.0, 102.0]
        with pytest.raises(RewardError, match="HTTP status 500, RuntimeError: CUDA out of memory"):
            RewardSet.create(reward).score(images, ["a", "broken"], [{}, {}])
    finally:
        server.shutdown()
        server.server_close()
