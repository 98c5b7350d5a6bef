"""Rewards with a network ask for its files before any work, and load it when they are told."""

from __future__ import annotations

import socket
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from refusals import Refusal
from torch import nn

from lacfast.rewards.model import ModelReward
from lacfast.rewards.registry import RewardSet
from lacfast.rewards.reward import RewardError


@dataclass(kw_only=True, eq=False)
class Mean(ModelReward):
    """A network that takes the mean."""

    name: str = "mean"
    model: str = "nobody/mean"
    loads: int = 0

    def load(self) -> nn.Module:
        self.loads += 1
        if self.model == "broken":
            raise OSError("no file named weights.bin\nand a long explanation")
        return nn.Linear(1, 1)

    def score(self, network: nn.Module, images: torch.Tensor, *_: Any) -> torch.Tensor:
        return images.mean(dim=(1, 2, 3))


@pytest.fixture
def no_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Directory of an empty cache, with a hub that nobody answers for."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{probe.getsockname()[1]}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("lacfast.rewards.model.getproxies", dict)
    return tmp_path


def test_a_model_that_is_missing_is_noticed_within_seconds(no_hub: Path) -> None:
    start = time.monotonic()
    with Refusal(
        "reward 'mean' needs nobody/mean, not on this disk, and the hub cannot be asked",
        cause="A reward's model that was never downloaded, on a machine without a network.",
        remedy="run `hf download nobody/mean` where there is a network, or pass directories",
        error=RewardError,
    ).raised():
        RewardSet.create(Mean()).prepared()
    assert time.monotonic() - start < 5


def test_offline_mode_is_told_as_such(no_hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(RewardError, match="HF_HUB_OFFLINE is set"):
        RewardSet.create(Mean()).check()


def test_what_is_on_this_disk_needs_no_hub(no_hub: Path) -> None:
    (no_hub / "models--nobody--mean" / "snapshots").mkdir(parents=True)
    RewardSet.create(Mean()).check()
    RewardSet.create(Mean(model=str(no_hub))).check()


def test_scoring_goes_on_in_smaller_batches_when_memory_runs_out(monkeypatch: pytest.MonkeyPatch) -> None:
    reward, images = Mean(), torch.rand(7, 3, 4, 4)
    expected = reward(images, [""] * 7, [{}] * 7)
    score = reward.score

    def within(network: nn.Module, part: torch.Tensor, *rest: Any) -> torch.Tensor:
        if len(part) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return score(network, part, *rest)

    monkeypatch.setattr(reward, "score", within)
    with pytest.warns(RuntimeWarning, match="Set batch_size of reward 'mean' to 3 to start there"):
        assert torch.equal(reward(images, [""] * 7, [{}] * 7), expected)
    with warnings.catch_warnings(action="error"):
        reward(images, [""] * 7, [{}] * 7)


def test_a_network_is_loaded_once_when_it_is_told_to(no_hub: Path) -> None:
    reward = Mean(model=str(no_hub))
    rewards = RewardSet.create(reward)
    rewards.check()
    assert reward.loads == 0
    assert rewards.prepared().prepared() is rewards
    scores = rewards.score(torch.ones(2, 3, 4, 4), ["a", "b"], [{}, {}])
    assert (reward.loads, scores["mean"].tolist()) == (1, [1.0, 1.0])


def test_a_network_that_cannot_be_loaded_names_its_reward() -> None:
    with Refusal(
        "reward 'mean' cannot be loaded: OSError: no file named weights.bin; ",
        cause="A reward's directory without the weights.",
        remedy="download its model where there is a network, or pass the reward with its directory",
        error=RewardError,
    ).raised():
        RewardSet.create(Mean(model="broken")).prepared()
