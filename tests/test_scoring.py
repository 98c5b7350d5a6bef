"""Rewards are found by name, and nothing unusable that they return is learned from."""

from __future__ import annotations

import re
import sys
import threading
import time
from concurrent.futures import CancelledError
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from tiny_backbones import brightness

from lacfast.scoring import REGISTERED, RewardError, RewardQueue, RewardSet

IMAGES = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
PROMPTS = ["one red circle", "one blue square"]


def score(reward: Any) -> dict[str, torch.Tensor]:
    return RewardSet.create(reward).score(IMAGES, PROMPTS, [{}, {}])


def test_callables_names_and_weights_are_understood() -> None:
    rewards = RewardSet.create({brightness: 2.0, "shapes": 0.5})
    assert rewards.names == ["brightness", "shapes"]
    assert rewards.weights.tolist() == [2.0, 0.5]
    assert RewardSet.create("shapes_gold").names == ["shapes_gold"]
    assert RewardSet.create(["shapes_strict", brightness]).weights.tolist() == [1.0, 1.0]


def test_arrays_and_lists_become_float32_on_the_cpu() -> None:
    assert score(lambda images, prompts, metadata: np.array([1, 2]))["<lambda>"].dtype == torch.float32
    assert score(lambda images, prompts, metadata: [0.5, 1.5])["<lambda>"].tolist() == [0.5, 1.5]


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (
            torch.tensor([1.0, torch.nan]),
            r"reward 'bad' returned nan for prompts \['one blue square'\].*on_reward_error='skip'",
        ),
        (torch.tensor([torch.inf, 1.0]), r"returned inf for prompts \['one red circle'\]"),
        (torch.zeros(3), r"returned shape \(3,\) for 2 images; return one number per image"),
        (torch.zeros(2, 1), r"returned shape \(2, 1\) for 2 images"),
    ],
)
def test_unusable_scores_name_the_reward_the_value_and_the_prompts(
    returned: torch.Tensor, message: str
) -> None:
    def bad(images: torch.Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> torch.Tensor:
        return returned

    with pytest.raises(RewardError, match=message):
        score(bad)


def test_a_reward_that_raises_is_named_with_its_error() -> None:
    def broken(images: torch.Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> torch.Tensor:
        raise KeyError("aesthetic")

    with pytest.raises(
        RewardError, match=re.escape("reward 'broken' raised KeyError: 'aesthetic' for prompts")
    ):
        score(broken)


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        ("clipscore", "unknown reward 'clipscore'; known: aesthetic, clip_score, hpsv2"),
        ([], "there is no reward"),
        ({}, "there is no reward"),
    ],
)
def test_a_reward_that_cannot_be_found_lists_the_known_ones(reward: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RewardSet.create(reward)


def test_two_rewards_of_one_name_are_refused() -> None:
    with pytest.raises(ValueError, match="two rewards share a name"):
        RewardSet.create([lambda images, prompts, metadata: [0, 0], lambda images, prompts, metadata: [1, 1]])


def test_every_registered_name_is_made_without_loading_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    # The only one that needs a package of its own.
    package = ModuleType("rapidocr")
    package.__spec__ = ModuleSpec("rapidocr", None)
    monkeypatch.setitem(sys.modules, "rapidocr", package)
    for name in REGISTERED:
        rewards = RewardSet.create({name: 0.5})
        assert rewards.names == [name]
        assert callable(rewards.functions[name])


def test_the_documentation_lists_every_registered_name() -> None:
    table = (Path(__file__).parents[1] / "docs" / "rewards.md").read_text(encoding="utf-8")
    rows = "\n".join(line for line in table.splitlines() if line.startswith("| `"))
    assert [name for name in REGISTERED if f"`{name}`" not in rows] == []


def test_a_callable_of_ones_own_may_be_named_by_its_module() -> None:
    rewards = RewardSet.create("tiny_backbones:brightness")
    assert rewards.names == ["brightness"]
    assert torch.equal(
        rewards.score(IMAGES, PROMPTS, [{}, {}])["brightness"], brightness(IMAGES, PROMPTS, [{}, {}])
    )


@pytest.mark.parametrize("location", ["no_such_module:reward", "tiny_backbones:no_such_reward"])
def test_a_module_or_name_that_does_not_exist_is_named(location: str) -> None:
    with pytest.raises(ValueError, match=f"reward '{location}' cannot be imported: .*no_such"):
        RewardSet.create(location)


def test_an_object_may_say_its_name() -> None:
    class Judge:
        name = "taste"

        def __call__(self, images: torch.Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Any:
            return [1.0] * len(prompts)

    assert RewardSet.create(Judge()).names == ["taste"]


class Gate:
    """A reward that returns the images' first value, as soon as the gate is open."""

    name = "gate"

    def __init__(self) -> None:
        self.open = threading.Event()
        self.seen: list[float] = []
        self.threads: set[int] = set()

    def __call__(self, images: torch.Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Any:
        assert self.open.wait(10)
        assert not torch.is_grad_enabled()
        self.threads.add(threading.get_ident())
        value = float(images.flatten()[0])
        self.seen.append(value)
        if value < 0:
            raise OSError("server lost")
        return [value] * len(prompts)


def batch(value: float) -> tuple[torch.Tensor, list[str], list[dict[str, Any]]]:
    return torch.full((2, 3, 4, 4), value), PROMPTS, [{}, {}]


def test_batches_are_scored_in_order_while_the_caller_goes_on() -> None:
    gate = Gate()
    with RewardQueue(RewardSet.create(gate), max_pending=3) as queue:
        futures = [queue.submit(*batch(value)) for value in (1.0, 2.0, 3.0)]
        assert [future.done() for future in futures] == [False] * 3
        gate.open.set()
        assert [future.result()["gate"].tolist() for future in futures] == [[1.0] * 2, [2.0] * 2, [3.0] * 2]
    assert gate.seen == [1.0, 2.0, 3.0]
    assert gate.threads.isdisjoint({threading.get_ident()})
    assert len(gate.threads) == 1


def test_an_error_belongs_to_its_batch_alone() -> None:
    gate = Gate()
    gate.open.set()
    with RewardQueue(RewardSet.create(gate), max_pending=3) as queue:
        first, second, third = (queue.submit(*batch(value)) for value in (1.0, -1.0, 3.0))
        assert third.result()["gate"].tolist() == [3.0, 3.0]
        with pytest.raises(RewardError, match="reward 'gate' raised OSError: server lost for prompts"):
            second.result()
        assert first.result()["gate"].tolist() == [1.0, 1.0]


def test_a_full_queue_makes_the_caller_wait() -> None:
    gate = Gate()
    with RewardQueue(RewardSet.create(gate), max_pending=1) as queue:
        queue.submit(*batch(1.0))
        second = threading.Thread(target=lambda: queue.submit(*batch(2.0)))
        second.start()
        second.join(0.1)
        assert second.is_alive()
        gate.open.set()
        second.join(10)
        assert not second.is_alive()
    assert gate.seen == [1.0, 2.0]


def test_closing_waits_for_every_batch_and_refuses_more() -> None:
    gate = Gate()
    queue = RewardQueue(RewardSet.create(gate), max_pending=2)
    futures = [queue.submit(*batch(1.0)), queue.submit(*batch(2.0))]
    gate.open.set()
    queue.close()
    assert all(future.done() for future in futures)
    with pytest.raises(ValueError, match="this reward queue is closed"):
        queue.submit(*batch(3.0))


def test_an_error_of_the_caller_drops_the_batches_that_wait() -> None:
    gate = Gate()
    futures = []

    def interrupted() -> None:
        with RewardQueue(RewardSet.create(gate), max_pending=3) as queue:
            futures.extend(queue.submit(*batch(value)) for value in (1.0, 2.0, 3.0))
            while not futures[0].running():
                time.sleep(0.001)
            threading.Timer(0.05, gate.open.set).start()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert futures[0].result()["gate"].tolist() == [1.0, 1.0]
    for future in futures[1:]:
        with pytest.raises(CancelledError):
            future.result()


def test_a_queue_must_let_a_batch_in() -> None:
    with pytest.raises(ValueError, match="max_pending=0"):
        RewardQueue(RewardSet.create(brightness), max_pending=0)


@pytest.mark.gpu
def test_images_on_the_gpu_are_read_after_they_are_made_and_before_they_are_reused() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    streams = []

    def mean(images: torch.Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> torch.Tensor:
        streams.append(torch.cuda.current_stream())
        return images.mean(dim=(1, 2, 3))

    with RewardQueue(RewardSet.create(mean), max_pending=8) as queue:
        futures = []
        for value in range(8):
            images = torch.zeros(64, 3, 256, 256, device="cuda")
            # Long work before the images have their values: a reader that does not wait sees zeros.
            torch.cuda._sleep(20_000_000)
            images += value
            futures.append(queue.submit(images, PROMPTS * 32, [{}] * 64))
            # The next allocation takes this memory unless the reader's stream is recorded.
            del images
        means = [future.result()["mean"].unique().tolist() for future in futures]
    assert means == [[float(value)] for value in range(8)]
    assert torch.cuda.current_stream() not in streams
