"""The shapes task: prompts, scenes, both checkers and the rewards."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
import torch

from lacfast.tasks import checker, gold
from lacfast.tasks.predicates import Detection, score
from lacfast.tasks.prompts import KINDS
from lacfast.tasks.scenes import BACKGROUND, PALETTE, PlacedObject, render, sample_images, sample_scene
from lacfast.tasks.shapes import (
    all_prompts,
    ground_truth,
    held_out_prompts,
    shapes_gold,
    shapes_height,
    shapes_partial,
    shapes_reward,
    shapes_strict,
    train_prompts,
)
from lacfast.tasks.task import Prompt

CHECKERS = (checker, gold)
RED_CIRCLE_LEFT_OF_BLUE_SQUARE: dict[str, Any] = {
    "kind": "left_of",
    "objects": [("red", "circle"), ("blue", "square")],
}


def metadata_of(prompts: list[Prompt]) -> list[dict[str, Any]]:
    return [prompt.metadata for prompt in prompts]


def test_the_split_is_disjoint_complete_and_balanced() -> None:
    train, held_out = train_prompts(), held_out_prompts()
    assert {prompt.text for prompt in train} | {prompt.text for prompt in held_out} == {
        prompt.text for prompt in all_prompts()
    }
    assert len(train) + len(held_out) == len(all_prompts()) == 306
    for kind in KINDS:
        assert sum(prompt.metadata["kind"] == kind for prompt in held_out) == 15


def test_the_split_is_the_same_every_time() -> None:
    assert held_out_prompts() == held_out_prompts()


@pytest.mark.parametrize("judge", CHECKERS)
def test_ground_truth_scores_one(judge: Any) -> None:
    prompts = all_prompts() * 2
    strict, partial = judge.check(sample_images(prompts, np.random.default_rng(1)), metadata_of(prompts))
    assert strict.min() == 1
    assert partial.min() == 1


@pytest.mark.parametrize("judge", CHECKERS)
def test_another_prompts_scene_is_rejected(judge: Any) -> None:
    prompts = all_prompts()
    others = prompts[150:] + prompts[:150]
    strict, partial = judge.check(sample_images(others, np.random.default_rng(2)), metadata_of(prompts))
    # "a red circle and a blue square" is true of a scene drawn for "a red circle left of a blue square".
    assert strict.mean() < 0.02
    assert 0.1 < partial.mean() < 0.5


@pytest.mark.parametrize("judge", CHECKERS)
@pytest.mark.parametrize("picture", ["blank", "black", "noise"])
def test_a_picture_of_nothing_is_rejected(judge: Any, picture: str) -> None:
    prompts = all_prompts()
    shape = (len(prompts), 3, 32, 32)
    noise = np.random.default_rng(3).random(shape, dtype=np.float32)
    images = {"blank": np.full(shape, 0.5, np.float32), "black": np.zeros(shape, np.float32), "noise": noise}
    strict, partial = judge.check(images[picture], metadata_of(prompts))
    assert strict.max() == 0
    assert partial.mean() < 0.01


@pytest.mark.parametrize("judge", CHECKERS)
def test_the_mirror_image_of_a_relation_is_rejected_but_earns_its_objects(judge: Any) -> None:
    image = render([PlacedObject("blue", "square", 0, 0), PlacedObject("red", "circle", 1, 1)])
    strict, partial = judge.check(image[None], [RED_CIRCLE_LEFT_OF_BLUE_SQUARE])
    assert strict[0] == 0
    assert partial[0] == 0.75


@pytest.mark.parametrize("judge", CHECKERS)
def test_an_additional_object_breaks_strict_and_costs_part_of_partial(judge: Any) -> None:
    scene = [PlacedObject("red", "circle", 0, 0), PlacedObject("blue", "square", 0, 1)]
    image = render([*scene, PlacedObject("green", "triangle", 1, 0)])
    strict, partial = judge.check(image[None], [RED_CIRCLE_LEFT_OF_BLUE_SQUARE])
    assert strict[0] == 0
    assert 0.5 < partial[0] < 1


def test_the_checkers_disagree_on_an_object_astride_the_cells() -> None:
    image = np.roll(render([PlacedObject("red", "circle", 0, 0)]), 8, axis=2)[None]
    wanted = [{"kind": "count", "objects": [("red", "circle")]}]
    assert checker.check(image, wanted)[0][0] == 1
    assert gold.check(image, wanted)[0][0] == 0


def test_the_checkers_disagree_on_a_pale_object() -> None:
    image = render([PlacedObject("red", "square", 0, 0)])
    pale = 0.5 + 0.55 * (image - 0.5)
    wanted = [{"kind": "count", "objects": [("red", "square")]}]
    assert checker.check(pale[None], wanted)[0][0] == 1
    assert gold.check(pale[None], wanted)[0][0] == 0


def test_the_checkers_disagree_on_a_grey_stain() -> None:
    image = render([PlacedObject("red", "square", 0, 0)])
    image[:, 18:30, 18:30] = 0.1
    wanted = [{"kind": "count", "objects": [("red", "square")]}]
    assert checker.check(image[None], wanted)[0][0] == 1
    assert gold.check(image[None], wanted)[0][0] == 0


def test_partial_never_exceeds_one_and_strict_means_partial_is_one() -> None:
    random = np.random.default_rng(5)
    prompts = all_prompts()
    noise = 0.25 * random.standard_normal((len(prompts), 3, 32, 32), dtype=np.float32)
    images = np.clip(sample_images(prompts, random) + noise, 0, 1)
    strict, partial = checker.check(images, metadata_of(prompts))
    assert (partial >= 0).all()
    assert (partial <= 1).all()
    assert (partial[strict == 1] == 1).all()


def test_a_count_scores_the_share_that_is_there() -> None:
    seen = [Detection("red", "circle", 8, 8)]
    assert score(seen, {"kind": "count", "objects": [("red", "circle")] * 4}) == (0, 0.25)


def test_an_unknown_kind_of_prompt_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"'inside'.*left_of"):
        score([], {"kind": "inside", "objects": [("red", "circle")]})


@pytest.mark.parametrize("judge", CHECKERS)
def test_images_that_do_not_fit_their_metadata_are_refused(judge: Any) -> None:
    with pytest.raises(ValueError, match="2 images do not fit 1 metadata"):
        judge.check(np.zeros((2, 3, 32, 32), np.float32), metadata_of(all_prompts()[:1]))


@pytest.mark.parametrize("judge", CHECKERS)
def test_a_batch_scores_as_its_images_alone(judge: Any) -> None:
    prompts = all_prompts()[::10]
    images = sample_images(prompts[::-1], np.random.default_rng(6))
    together = judge.check(images, metadata_of(prompts))[1]
    alone = [judge.check(images[i : i + 1], [prompts[i].metadata])[1][0] for i in range(len(prompts))]
    assert together.tolist() == alone


@pytest.mark.parametrize("judge", CHECKERS)
def test_a_check_costs_next_to_nothing(judge: Any) -> None:
    """0.2 ms of an idle core; the bound leaves room for a busy one and none for a loop over pixels."""
    prompts = all_prompts()
    images = sample_images(prompts, np.random.default_rng(7))
    judge.check(images, metadata_of(prompts))
    seconds = []
    for _ in range(5):
        start = time.process_time()
        judge.check(images, metadata_of(prompts))
        seconds.append(time.process_time() - start)
    assert min(seconds) / len(prompts) < 2e-3


def test_the_reward_is_the_mean_of_strict_and_partial() -> None:
    prompts = all_prompts()[:100]
    images = ground_truth(all_prompts()[20:120], seed=8)
    texts, metadata = [prompt.text for prompt in prompts], metadata_of(prompts)
    strict, partial = shapes_strict(images, texts, metadata), shapes_partial(images, texts, metadata)
    reward = shapes_reward(images, texts, metadata)
    assert reward.shape == (100,)
    assert reward.dtype == torch.float32
    torch.testing.assert_close(reward, 0.5 * strict + 0.5 * partial, rtol=0, atol=0)
    assert shapes_gold(ground_truth(prompts), texts, metadata).min() == 1


def test_scenes_depend_on_the_seed_alone() -> None:
    prompts = all_prompts()[:20]
    assert torch.equal(ground_truth(prompts, seed=9), ground_truth(prompts, seed=9))
    assert not torch.equal(ground_truth(prompts, seed=9), ground_truth(prompts, seed=10))


def test_left_of_is_drawn_from_column_zero_to_column_one() -> None:
    prompts = [prompt for prompt in all_prompts() if prompt.metadata["kind"] == "left_of"]
    for prompt in prompts:
        first, second = sample_scene(prompt, np.random.default_rng(11))
        assert (first.column, second.column) == (0, 1)


def test_pictures_hold_the_background_and_the_palette() -> None:
    image = render([PlacedObject("yellow", "square", 1, 1)])
    assert image[:, 24, 24].tolist() == pytest.approx(PALETTE["yellow"])
    assert image[:, 4, 4].tolist() == [0.5, 0.5, 0.5]


def test_height_is_that_of_the_ink() -> None:
    top, bottom = (torch.from_numpy(render([PlacedObject("red", "square", row, 0)])) for row in (0, 1))
    images = torch.stack([top, bottom, torch.full((3, 32, 32), BACKGROUND)])
    scores = shapes_height(images, [], [])
    # The centres of the cells' objects lie at 7.5 and 23.5 of 31 pixels.
    assert scores.tolist() == pytest.approx([1 - 7.5 / 31, 1 - 23.5 / 31, 0.0], abs=1e-3)
