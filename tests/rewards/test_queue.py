"""Batches are decoded and scored aside, in order, each with its own error, and never too many at once."""

from __future__ import annotations

import threading
import time
from concurrent.futures import CancelledError
from typing import Any

import pytest
import torch
from refusals import Refusal
from tiny_backbones import brightness

from lacfast.rewards.queue import DecodeError, RewardQueue
from lacfast.rewards.registry import RewardSet
from lacfast.rewards.reward import RewardError

PROMPTS = ["one red circle", "one blue square"]


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
        with Refusal(
            "reward 'gate' raised OSError: server lost for prompts",
            cause="A reward function that raises.",
            remedy="fix the reward, or set on_reward_error='skip' to drop such rollouts",
            error=RewardError,
        ).raised():
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
    with Refusal(
        "this reward queue is closed",
        cause="Images for a queue after its `close`.",
        remedy="make another one",
    ).raised():
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


def test_a_reward_that_does_not_return_is_left_behind(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("lacfast.rewards.queue._LEAVE_BEHIND_S", 0.05)
    gate = Gate()
    queue = RewardQueue(RewardSet.create(gate))
    future = queue.submit(*batch(1.0))
    while not future.running():
        time.sleep(0.001)
    queue.close(cancel=True)
    with pytest.raises(CancelledError):
        future.result()
    assert "['gate'] are still at work and left behind" in caplog.text
    gate.open.set()


HANGS = Refusal(
    "reward 'gate' has not returned for 0.05 s for prompts ['one red circle', 'one blue square']",
    cause="A reward that hangs, as on a lock, a download or a subprocess.",
    remedy="drop such rollouts; one that needs longer says so by an attribute time_limit_s",
    error=RewardError,
)


def test_a_reward_that_hangs_fails_its_batch_and_its_late_scores_are_dropped() -> None:
    gate = Gate()
    gate.time_limit_s = 0.05  # type: ignore[attr-defined]
    with RewardQueue(RewardSet.create(gate)) as queue:
        hung = queue.submit(*batch(1.0))
        with HANGS.raised():
            hung.result()
        # The interpreter waits for the others when it ends.
        assert all(thread.daemon for thread in threading.enumerate() if "lacfast" in thread.name)
        gate.open.set()
        # The next batch does not wait for the call that was left behind.
        assert queue.submit(*batch(2.0)).result()["gate"].tolist() == [2.0, 2.0]
    while len(gate.seen) < 2:
        time.sleep(0.001)
    assert len(gate.threads) == 2
    with pytest.raises(RewardError, match="has not returned"):
        hung.result()


def test_a_time_limit_is_a_time() -> None:
    gate = Gate()
    gate.time_limit_s = 0  # type: ignore[attr-defined]
    with Refusal(
        "reward 'gate' has time_limit_s=0",
        cause="A reward that may take no time.",
        remedy="give it seconds above 0, or math.inf for no limit",
    ).raised():
        RewardSet.create(gate)


def test_a_time_out_of_the_reward_s_own_is_its_error() -> None:
    def impatient(*_: Any) -> Any:
        raise TimeoutError("no answer")

    with RewardQueue(RewardSet.create(impatient)) as queue:
        future = queue.submit(*batch(1.0))
    with pytest.raises(RewardError, match="reward 'impatient' raised TimeoutError: no answer"):
        future.result()


def test_a_queue_must_let_a_batch_in() -> None:
    with Refusal(
        "max_pending=0 lets no batch in",
        cause="A queue without a place.",
        remedy="use 1 or more",
    ).raised():
        RewardQueue(RewardSet.create(brightness), max_pending=0)


class Decoder:
    """Doubles the latents as soon as the gate is open; negative ones cannot be decoded."""

    def __init__(self) -> None:
        self.open = threading.Event()
        self.threads: list[int] = []

    def __call__(self, latents: torch.Tensor) -> torch.Tensor:
        assert self.open.wait(10)
        assert not torch.is_grad_enabled()
        self.threads.append(threading.get_ident())
        if float(latents.flatten()[0]) < 0:
            raise MemoryError("too large")
        return 2 * latents


def test_decoding_aside_lets_the_caller_go_on_and_comes_before_scoring() -> None:
    decoder, gate = Decoder(), Gate()
    gate.open.set()
    with RewardQueue(RewardSet.create(gate), decode=decoder, decode_aside=True, max_pending=2) as queue:
        futures = [queue.submit(*batch(value)) for value in (1.0, 2.0)]
        # The caller is here, where it samples the next batch, though nothing is decoded yet.
        assert gate.seen == decoder.threads == []
        decoder.open.set()
        assert [future.result()["gate"].tolist() for future in futures] == [[2.0] * 2, [4.0] * 2]
    assert len(set(decoder.threads)) == len(gate.threads) == 1
    assert {threading.get_ident()}.isdisjoint({*decoder.threads, *gate.threads})
    assert gate.threads.isdisjoint(decoder.threads)


def test_a_batch_is_decoded_while_the_one_before_is_scored() -> None:
    decoder, gate = Decoder(), Gate()
    decoder.open.set()
    with RewardQueue(RewardSet.create(gate), decode=decoder, decode_aside=True, max_pending=2) as queue:
        queue.submit(*batch(1.0))
        queue.submit(*batch(2.0))
        while len(decoder.threads) < 2:
            time.sleep(0.001)
        assert gate.seen == []
        gate.open.set()
    assert gate.seen == [2.0, 4.0]


def test_without_decode_aside_the_caller_decodes() -> None:
    decoder, gate = Decoder(), Gate()
    decoder.open.set()
    gate.open.set()
    with RewardQueue(RewardSet.create(gate), decode=decoder) as queue:
        assert queue.submit(*batch(1.0)).result()["gate"].tolist() == [2.0, 2.0]
    assert decoder.threads == [threading.get_ident()]


@pytest.mark.parametrize("aside", [False, True])
def test_what_cannot_be_decoded_fails_its_batch_alone(aside: bool) -> None:
    decoder, gate = Decoder(), Gate()
    decoder.open.set()
    gate.open.set()
    with RewardQueue(RewardSet.create(gate), decode=decoder, decode_aside=aside, max_pending=3) as queue:
        first, second, third = (queue.submit(*batch(value)) for value in (1.0, -1.0, 3.0))
        with Refusal(
            "decoding raised MemoryError: too large for 2 latents of prompts ['one red circle'",
            cause="A decoder that has no memory for its images.",
            remedy="lower rollout_batch_size or eval_batch_size",
            error=DecodeError,
        ).raised():
            second.result()
        assert first.result()["gate"].tolist() == [2.0, 2.0]
        assert third.result()["gate"].tolist() == [6.0, 6.0]
    assert gate.seen == [2.0, 6.0]


def test_undecoded_batches_count_as_pending() -> None:
    decoder, gate = Decoder(), Gate()
    gate.open.set()
    with RewardQueue(RewardSet.create(gate), decode=decoder, decode_aside=True, max_pending=1) as queue:
        queue.submit(*batch(1.0))
        second = threading.Thread(target=lambda: queue.submit(*batch(2.0)))
        second.start()
        second.join(0.1)
        assert second.is_alive()
        decoder.open.set()
        second.join(10)
        assert not second.is_alive()


@pytest.mark.gpu
def test_latents_on_the_gpu_are_decoded_and_scored_on_streams_of_their_own() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    streams = []

    def decode(latents: torch.Tensor) -> torch.Tensor:
        streams.append(torch.cuda.current_stream())
        torch.cuda._sleep(20_000_000)
        return latents + 1

    def mean(images: torch.Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> torch.Tensor:
        streams.append(torch.cuda.current_stream())
        return images.mean(dim=(1, 2, 3))

    with RewardQueue(RewardSet.create(mean), decode=decode, decode_aside=True, max_pending=8) as queue:
        futures = []
        for value in range(8):
            latents = torch.zeros(64, 3, 256, 256, device="cuda")
            torch.cuda._sleep(20_000_000)
            latents += value
            futures.append(queue.submit(latents, PROMPTS * 32, [{}] * 64))
            # The next allocation takes this memory unless the reader's stream is recorded.
            del latents
        means = [future.result()["mean"].unique().tolist() for future in futures]
    assert means == [[value + 1.0] for value in range(8)]
    assert len({stream.cuda_stream for stream in streams}) == 2
    assert torch.cuda.current_stream() not in streams


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
