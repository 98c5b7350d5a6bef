"""A rollout in parts is the rollout at once, and a reward that fails loses nothing."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from tiny_backbones import PROMPTS, brightness, tiny_backbone, tiny_config
from torch import Tensor

from lacfast import LatentActorCriticTrainer
from lacfast.prompts import PromptSet
from lacfast.rewards.queue import DecodeError
from lacfast.rewards.reward import RewardError


def trainer(reward: Any = brightness, **changes: Any) -> LatentActorCriticTrainer:
    config = tiny_config(**changes)
    return LatentActorCriticTrainer(tiny_backbone("dit"), reward, PROMPTS, config)


@pytest.mark.isa
@pytest.mark.parametrize("part_size", [1, 3, 8, 100])
def test_parts_make_the_same_rollout(part_size: int) -> None:
    prompts = PromptSet.create(PROMPTS).cycle(8)
    whole = trainer().collect(prompts, 40)
    parts = trainer(rollout_batch_size=part_size).collect(prompts, 40)
    assert whole is not None
    assert parts is not None
    assert parts.prompts == whole.prompts
    assert torch.equal(parts.noise.sample_ids, whole.noise.sample_ids)
    # A batch of another size sums in another order inside the model.
    torch.testing.assert_close(parts.latents, whole.latents, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(parts.values, whole.values, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(parts.rewards["brightness"], whole.rewards["brightness"], rtol=1e-4, atol=1e-5)
    for name, features in whole.features.items():
        assert parts.features[name].shape == features.shape


def test_every_part_is_scored_once_with_its_own_prompts() -> None:
    seen: list[str] = []

    def reward(images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
        seen.extend(prompts)
        return torch.zeros(len(prompts))

    made = trainer(reward, rollout_batch_size=3)
    made.collect(PromptSet.create(PROMPTS).cycle(8), 0)
    assert seen == PromptSet.create(PROMPTS).cycle(8).texts


def test_a_reward_that_fails_on_one_part_keeps_the_whole_rollout() -> None:
    calls: list[int] = []

    def reward(images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
        calls.append(len(prompts))
        return torch.full((len(prompts),), float("nan") if len(calls) == 2 else 0.5)

    made = trainer(reward, rollout_batch_size=3)
    with pytest.raises(RewardError, match="reward"):
        made.collect(PromptSet.create(PROMPTS).cycle(8), 0)
    assert made.last_rollout is not None
    assert made.last_rollout.batch_size == 8
    assert made.last_rollout.rewards == {}


def test_a_part_that_cannot_be_decoded_keeps_the_rollout_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    made = trainer(rollout_batch_size=4)

    def decode(latents: Tensor) -> Tensor:
        raise MemoryError("no room")

    monkeypatch.setattr(made.backbone, "decode", decode)
    with pytest.raises(DecodeError, match="MemoryError: no room for 4 latents"):
        made.collect(PromptSet.create(PROMPTS).cycle(8), 0)
    assert made.last_rollout is not None
    assert made.last_rollout.batch_size == 8


def test_evaluation_and_rollout_score_a_part_while_the_next_is_sampled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    events: list[str] = []
    sampled = threading.Semaphore(0)

    def reward(images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
        if "scored" not in events[-2:]:
            # The first part is not scored before the second has been sampled: only overlap ends this wait.
            assert sampled.acquire(timeout=60)
            assert sampled.acquire(timeout=60)
        events.append("scored")
        return images.mean(dim=(1, 2, 3))

    made = trainer(reward, rollout_batch_size=4, eval_batch_size=4)
    sample = made.sampler.sample

    def watched(*args: Any, **kwargs: Any) -> Any:
        rollout = sample(*args, **kwargs)
        events.append("sampled")
        sampled.release()
        return rollout

    monkeypatch.setattr(made.sampler, "sample", watched)
    for work in (lambda: made.collect(PromptSet.create(PROMPTS).cycle(8), 0), lambda: made.evaluate()):
        events.clear()
        work()
        assert events == ["sampled", "sampled", "scored", "scored"]
