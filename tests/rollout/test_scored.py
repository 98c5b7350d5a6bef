"""A rollout in parts is the rollout at once, and a reward that fails loses nothing."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from refusals import Refusal
from tiny_backbones import PROMPTS, brightness, tiny_backbone, tiny_config
from torch import Tensor

from lacfast import LatentActorCriticTrainer, steer
from lacfast.config import SteeringConfig
from lacfast.prompts import PromptSet
from lacfast.rewards.queue import DecodeError
from lacfast.rewards.reward import RewardError

BY_REWARD = SteeringConfig(method="best_of_n", particles=2, selection="reward")


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


def break_from(made: LatentActorCriticTrainer, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the model give NaN from a denoising step on."""
    predict, timesteps = made.backbone.predict, made.table.timesteps

    def broken(sample: Tensor, timestep: Tensor, conditioning: Any) -> Tensor:
        output = predict(sample, timestep, conditioning)
        return torch.where(timestep[0] <= timesteps[step], torch.full_like(output, torch.nan), output)

    monkeypatch.setattr(made.backbone, "predict", broken)


NAN_STEP = Refusal(
    "denoising step 2 of 4 (timestep 500) made NaN or infinity in the images of prompts",
    cause="The model's output is NaN from a denoising step on.",
    remedy="lower the learning rate or the guidance scale, or use float32 or bfloat16",
    error=RewardError,
)
NAN_DECODER = Refusal(
    "the decoder, of finite latents, made NaN or infinity in the images of prompts",
    cause="The decoder makes NaN of latents that are finite, as one does in half precision.",
    remedy="use float32 or bfloat16",
    error=RewardError,
)


def never(images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
    pytest.fail("a reward was asked")


@pytest.mark.parametrize("refusal", [NAN_STEP, NAN_DECODER], ids=["step", "decoder"])
def test_images_of_nan_name_what_made_them_and_no_reward_is_asked(
    refusal: Refusal, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = trainer(never, eval_batch_size=4)
    if refusal is NAN_STEP:
        break_from(made, 2, monkeypatch)
    else:
        monkeypatch.setattr(
            made.backbone, "decode", lambda latents: latents.new_full((len(latents), 3, 8, 8), torch.nan)
        )
    works: list[Callable[[], object]] = [
        lambda: made.collect(PromptSet.create(PROMPTS), 0),
        made.evaluate,
        lambda: steer(made.backbone, PROMPTS[:2], sampler=made.config.sampler),
        lambda: steer(made.backbone, PROMPTS[:2], BY_REWARD, sampler=made.config.sampler, rewards=never),
    ]
    for work in works:
        with refusal.raised():
            work()


def test_a_rollout_with_an_image_of_nan_is_skipped_where_rewards_may_fail(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A run that ended there would make it again from its checkpoint."""
    made, decode = trainer(on_reward_error="skip"), tiny_backbone("dit").decode
    rollouts: list[Tensor] = []

    def nan_at_first(latents: Tensor) -> Tensor:
        rollouts.append(latents)
        images = decode(latents)
        return images if len(rollouts) > 1 else images.index_fill(0, torch.tensor([3]), torch.nan)

    monkeypatch.setattr(made.backbone, "decode", nan_at_first)
    with pytest.warns(UserWarning, match="rollout of 8 images skipped: the decoder, of finite latents, made"):
        assert made.train_iteration()["skipped"]
    assert "skipped" not in made.train_iteration()


def test_a_reward_that_hangs_costs_a_rollout_where_rewards_may_fail() -> None:
    calls, ends = [], threading.Event()

    def hangs_at_first(images: Tensor, *_: Any) -> Tensor:
        calls.append(len(images))
        if len(calls) == 1:
            ends.wait(60)
        return images.mean(dim=(1, 2, 3))

    hangs_at_first.time_limit_s = 0.1  # type: ignore[attr-defined]
    made = trainer(hangs_at_first, on_reward_error="skip")
    with pytest.warns(UserWarning, match="skipped: reward 'hangs_at_first' has not returned for 0.1 s"):
        assert made.train_iteration()["skipped"]
    hangs_at_first.time_limit_s = 60  # type: ignore[attr-defined]
    assert "skipped" not in made.train_iteration()
    ends.set()


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
