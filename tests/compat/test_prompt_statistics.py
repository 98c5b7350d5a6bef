"""The peers' reward statistics per prompt, against a plain loop over the prompts."""

from __future__ import annotations

from collections import defaultdict, deque

import numpy as np
import pytest
from refusals import Refusal

from lacfast.compat.ddpo import PerPromptStatTracker as BufferedStatTracker
from lacfast.compat.flow_grpo import PerPromptStatTracker as GroupStatTracker

RANDOM = np.random.default_rng


@pytest.mark.parametrize("shape", [(24,), (24, 5)])
@pytest.mark.parametrize("global_std", [False, True])
def test_group_advantages_are_relative_to_all_of_a_prompts_rewards(
    shape: tuple[int, ...], global_std: bool
) -> None:
    random, tracker, seen = RANDOM(0), GroupStatTracker(global_std), defaultdict(list)
    for _ in range(3):
        prompts = [f"prompt {row}" for row in random.integers(0, 5, shape[0])]
        rewards = random.normal(size=shape)
        advantages = tracker.update(prompts, rewards)
        for prompt, reward in zip(prompts, rewards, strict=True):
            seen[prompt].append(reward)
        for row, prompt in enumerate(prompts):
            scale = rewards if global_std else np.array(seen[prompt])
            expected = (rewards[row] - np.mean(seen[prompt], axis=0)) / (scale.std(axis=0) + 1e-4)
            np.testing.assert_allclose(advantages[row], expected, rtol=1e-10)
    assert tracker.get_stats() == (sum(map(len, seen.values())) / len(seen), len(seen))


def test_clearing_forgets_rewards_but_not_which_prompts_were_seen() -> None:
    tracker = GroupStatTracker()
    tracker.update(["a", "a", "b"], [1.0, 3.0, 5.0])
    tracker.clear()
    assert tracker.stats == {}
    assert tracker.get_stats() == (0, 2)
    np.testing.assert_allclose(tracker.update(["a", "a"], [10.0, 12.0]), [-1, 1], rtol=1e-3)


def test_the_other_kinds_of_weights() -> None:
    prompts, rewards = ["a", "b", "a", "b", "a"], [1.0, 5.0, 3.0, 5.0, 2.0]
    tracker = GroupStatTracker()
    assert tracker.update(prompts, rewards, type="rwr").tolist() == rewards
    assert tracker.update(prompts, rewards, type="sft").tolist() == [0, 1, 1, 1, 0]
    # All of b are equal: its second is taken as the better.
    assert tracker.update(prompts, rewards, type="dpo").tolist() == [-1, -1, 1, 1, 0]


@pytest.mark.parametrize("shape", [(9,), (9, 4)])
def test_gardo_weighs_what_is_good_by_how_unlike_the_others_it_is(shape: tuple[int, ...]) -> None:
    random, tracker = RANDOM(2), GroupStatTracker()
    prompts, rewards = ["a", "b", "c"] * 3, random.normal(size=shape)
    features = random.normal(size=(9, 5))
    advantages = tracker.update(prompts, rewards, dists=features, type="gardo")
    for prompt in "abc":
        rows = [row for row in range(9) if prompts[row] == prompt]
        nearest = []
        for row in rows:
            cosines = [
                features[row]
                @ features[other]
                / np.linalg.norm(features[row])
                / np.linalg.norm(features[other])
                for other in rows
                if other != row
            ]
            nearest.append(1 - max(cosines))
        for row, distance in zip(rows, nearest, strict=True):
            centred = rewards[row] - rewards[rows].mean(axis=0)
            expected = np.where(centred < 0, centred, centred * distance / np.mean(nearest))
            np.testing.assert_allclose(advantages[row], expected, rtol=1e-10)
    twins = GroupStatTracker().update(["a", "a"], [1.0, 3.0], np.ones((2, 3)), "gardo")
    assert twins.tolist() == [-1.0, 1.0]


def test_the_type_may_stand_third_as_it_once_did() -> None:
    assert GroupStatTracker().update(["a", "a"], [1.0, 2.0], "sft").tolist() == [0.0, 1.0]


def test_group_statistics_refuse_what_they_cannot_compare() -> None:
    tracker = GroupStatTracker()
    with pytest.raises(ValueError, match="known: 'grpo', 'rwr', 'sft', 'dpo', 'gardo'"):
        tracker.update(["a"], [1.0], type="ppo")
    with Refusal(
        "type='gardo' needs dists",
        cause="GARDO's advantages without the features that say how unlike the images are.",
        remedy="pass both dists=... and type='gardo'",
    ).raised():
        tracker.update(["a"], [1.0], type="gardo")
    with Refusal(
        "type='grpo' would ignore dists",
        cause="Features of the images for advantages that do not read them.",
        remedy="or neither",
    ).raised():
        tracker.update(["a"], [1.0], np.ones((1, 2)))
    with pytest.raises(ValueError, match="'gardo' compares samples of one prompt"):
        tracker.update(["a"], [1.0], np.ones((1, 2)), "gardo")
    with pytest.raises(ValueError, match="2 prompts and 3 rewards"):
        tracker.update(["a", "b"], [1.0, 2.0, 3.0])
    with pytest.raises(ValueError, match="at least two"):
        tracker.update(["a", "b", "b"], [1.0, 2.0, 3.0], type="dpo")


@pytest.mark.parametrize(("buffer_size", "min_count"), [(16, 4), (8, 8), (3, 1), (4, 6), (1, 1)])
def test_buffered_advantages_are_relative_to_the_last_rewards(buffer_size: int, min_count: int) -> None:
    random, tracker = RANDOM(1), BufferedStatTracker(buffer_size, min_count)
    kept: dict[str, deque[float]] = defaultdict(lambda: deque(maxlen=buffer_size))
    for _ in range(6):
        prompts = [f"prompt {row}" for row in random.integers(0, 6, 20)]
        rewards = random.normal(size=20)
        advantages = tracker.update(prompts, rewards)
        for prompt, reward in zip(prompts, rewards, strict=True):
            kept[prompt].append(reward)
        for row, prompt in enumerate(prompts):
            own = rewards if len(kept[prompt]) < min_count else np.array(kept[prompt])
            expected = (rewards[row] - own.mean()) / (own.std() + 1e-6)
            np.testing.assert_allclose(advantages[row], expected, rtol=1e-8, atol=1e-8)
    assert {prompt: sorted(rewards) for prompt, rewards in tracker.stats.items()} == {
        prompt: sorted(rewards) for prompt, rewards in kept.items()
    }
    for prompt, statistics in tracker.get_stats().items():
        assert statistics["count"] == len(kept[prompt])
        np.testing.assert_allclose(statistics["mean"], np.mean(kept[prompt]))
        np.testing.assert_allclose(statistics["std"], np.std(kept[prompt]), atol=1e-12)


def test_advantages_keep_a_floating_dtype_and_integers_their_fraction() -> None:
    assert BufferedStatTracker(4, 1).update(["a"] * 2, np.array([1, 2], np.float32)).dtype == np.float32
    np.testing.assert_allclose(BufferedStatTracker(4, 1).update(["a"] * 3, [1, 2, 3])[0], -1.22474, rtol=1e-4)


def test_buffered_statistics_refuse_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="buffer_size=0"):
        BufferedStatTracker(0, 1)
    with pytest.raises(ValueError, match="must match"):
        BufferedStatTracker(4, 1).update(["a"], [1.0, 2.0])
