"""The crowds task: groups of objects, pictures that obey them, and both judges."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from lacfast.tasks import crowds
from lacfast.tasks.predicates import Detection
from lacfast.tasks.pretraining import pretrain

PROMPTS = crowds.all_prompts()
METADATA = [prompt.metadata for prompt in PROMPTS]
LEFT: dict[str, Any] = {
    "kind": "left_of",
    "groups": [(2, "red", "circle"), (3, "blue", "square")],
}


def seen(columns: list[int], *, blue: str = "blue") -> list[Detection]:
    """Two red circles and three blue squares, in these columns of their own rows."""
    things = [("red", "circle")] * 2 + [(blue, "square")] * 3
    return [
        Detection(*thing, y=16.0 * row + 8, x=16.0 * column + 8)
        for row, (thing, column) in enumerate(zip(things, columns, strict=True))
    ]


def test_there_are_120_different_prompts_of_each_kind_with_five_to_eight_objects() -> None:
    assert len({prompt.text for prompt in PROMPTS}) == 360
    assert [sum(wanted["kind"] == kind for wanted in METADATA) for kind in crowds.KINDS] == [120] * 3
    assert {sum(group[0] for group in wanted["groups"]) for wanted in METADATA} == {5, 6, 7, 8}
    assert all(len({group[1:] for group in wanted["groups"]}) == 2 for wanted in METADATA)


@pytest.mark.parametrize("scale", [1, 2])
def test_both_judges_accept_the_ground_truth_and_no_other_prompt_s(scale: int) -> None:
    task, some = crowds.task(scale), slice(None, None, 5)
    images = torch.from_numpy(task.draw(PROMPTS[some], np.random.default_rng(0)))
    assert images.shape[1:] == (3, 48 * scale, 48 * scale)
    given = METADATA[some]
    for judge in (crowds.crowds_strict, crowds.crowds_reward, crowds.crowds_gold):
        assert bool((judge(images, [], given) == 1).all())
        assert float(judge(images, [], [*given[1:], given[0]]).mean()) < 0.3


def test_a_missing_an_additional_and_a_misplaced_object_are_strictly_wrong() -> None:
    assert crowds.score(seen([0, 0, 1, 2, 2]), LEFT) == (1, 1)
    # Four of five: 4/5 of the objects' share, all of the relation's.
    assert crowds.score(seen([0, 0, 1, 2, 2])[:4], LEFT) == (0, pytest.approx(0.75 * 4 / 5 + 0.25))
    extra = [*seen([0, 0, 1, 2, 2]), Detection("green", "triangle", 40.0, 40.0)]
    assert crowds.score(extra, LEFT) == (0, pytest.approx(0.75 * 5 / 6 + 0.25))
    # One of two circles stands in the column of one of three squares: five pairs of six obey.
    assert crowds.score(seen([0, 1, 1, 2, 2]), LEFT) == (0, pytest.approx(0.75 + 0.25 * 5 / 6))


def test_a_wrong_colour_is_half_an_object_and_no_part_of_a_group() -> None:
    strict, partial = crowds.score(seen([0, 0, 1, 2, 2], blue="yellow"), LEFT)
    assert (strict, partial) == (0, pytest.approx(0.75 * 3.5 / 5))
    assert crowds.score([], LEFT) == (0, 0)


def test_metadata_that_come_from_json_are_judged_alike() -> None:
    listed = LEFT | {"groups": [list(group) for group in LEFT["groups"]]}
    assert crowds.score(seen([0, 0, 1, 2, 2]), listed) == (1, 1)


def test_metadata_of_another_task_are_refused() -> None:
    with pytest.raises(ValueError, match=r"name no kind of both, left_of, above with two groups"):
        crowds.crowds_reward(torch.zeros(1, 3, 48, 48), [""], [{"kind": "count", "objects": []}])


def test_pictures_of_the_shapes_task_are_refused() -> None:
    with pytest.raises(ValueError, match=r"give \(B, 3, 48, 48\)"):
        crowds.crowds_reward(torch.zeros(1, 3, 32, 32), [""], [LEFT])


def test_a_tiny_model_is_made_for_its_pictures() -> None:
    made = pretrain("dit", crowds.TASK, steps=1)
    assert made.model.config.sample_size == 12
    assert made.text.length == max(len(prompt.text.split()) for prompt in PROMPTS) == 8
