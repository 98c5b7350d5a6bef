"""A reward gets what it declares, may answer as others' do, and nothing unusable is learned from."""

from __future__ import annotations

import reprlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from refusals import Refusal
from tiny_backbones import brightness, tiny_backbone, tiny_config

from lacfast.prompts import PromptSet
from lacfast.rewards.image_files import to_uint8
from lacfast.rewards.registry import RewardSet, declared_heads
from lacfast.rewards.reward import Declaration, NotFiniteError, RewardError, declares
from lacfast.trainer import LatentActorCriticTrainer

IMAGES = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
PROMPTS = ["one red circle", "one blue square"]
SCORES = torch.tensor([1.0, 2.0])


def score(reward: Any, metadata: list[dict[str, Any]] | None = None) -> dict[str, torch.Tensor]:
    return RewardSet.create(reward).score(IMAGES, PROMPTS, metadata or [{}, {}])


def returns(returned: Any, **declared: Any) -> Any:
    """A reward that returns `returned`, whatever it is given."""

    @declares(**declared)
    def constant(images: Any, prompts: list[str], metadata: list[dict[str, Any]]) -> Any:
        return returned

    return constant


@pytest.mark.parametrize("notes", [{}, {"tokens": 3}])
def test_a_dict_of_notes_beside_the_scores_is_left_out(notes: dict[str, int]) -> None:
    assert score(returns((SCORES, notes)))["constant"].tolist() == [1.0, 2.0]
    both = score(returns(({"a": SCORES, "b": [0, 0]}, notes), heads=("a", "b")))
    assert {name: scores.tolist() for name, scores in both.items()} == {"a": [1.0, 2.0], "b": [0.0, 0.0]}


def test_two_scores_in_a_tuple_are_two_scores() -> None:
    assert score(returns((1.0, 2.0)))["constant"].tolist() == [1.0, 2.0]


def test_declared_scores_are_heads_with_weights_of_their_own() -> None:
    judge = returns({"style": -SCORES, "content": SCORES}, heads=("content", "style"), weights=(1.0, 0.5))
    rewards = RewardSet.create({judge: 2.0, brightness: 3.0})
    assert rewards.names == ["content", "style", "brightness"]
    assert rewards.weights.tolist() == [2.0, 1.0, 3.0]
    assert list(rewards.score(IMAGES, PROMPTS, [{}, {}])) == rewards.names
    union = RewardSet.union([rewards, RewardSet.create([judge, "shapes"])])
    assert (union.names, union.weights.tolist()) == ([*rewards.names, "shapes"], [2.0, 1.0, 3.0, 1.0])


def test_a_trainer_has_a_head_for_each_declared_score() -> None:
    @declares(heads=("light", "dark"))
    def both(images: torch.Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Any:
        light = brightness(images, prompts, metadata)
        return {"light": light, "dark": 1 - light}, {}

    trainer = LatentActorCriticTrainer(tiny_backbone("dit"), both, ["one red circle"], tiny_config())
    assert trainer.critic is not None
    assert trainer.critic.num_rewards == 2
    metrics = trainer.train_iteration()
    assert metrics["reward/light"] + metrics["reward/dark"] == pytest.approx(1)


@pytest.mark.parametrize(
    ("reward", "refused"),
    [
        (
            returns({"a": SCORES, "b": SCORES}),
            Refusal(
                "declares no scores by name and returned ['a', 'b'] for prompts ['one red circle'",
                cause="A reward that returns a dict of scores and did not say so.",
                remedy="set the reward's attribute declaration = Declaration(heads=('a', 'b'))",
                error=RewardError,
            ),
        ),
        (
            returns({"a": SCORES, "c": SCORES}, heads=("a", "b")),
            Refusal(
                "declares the scores ['a', 'b'] and returned ['a', 'c']",
                cause="A reward whose scores have other names than it declares.",
                remedy="Declaration(heads=('a', 'c'))",
                error=RewardError,
            ),
        ),
        (
            returns(SCORES, heads=("a", "b")),
            Refusal(
                "declares the scores ['a', 'b'] and returned tensor([1., 2.])",
                cause="A reward that declares scores by name and returns one for each image.",
                remedy="return a dict of them",
                error=RewardError,
            ),
        ),
    ],
)
def test_scores_of_other_names_than_the_declared_are_refused(reward: Any, refused: Refusal) -> None:
    with refused.raised():
        score(reward)


def test_a_score_of_several_is_named_when_it_cannot_be_used() -> None:
    with pytest.raises(RewardError, match="reward 'constant' for its score 'b' returned nan for prompts"):
        score(returns({"a": SCORES, "b": SCORES * torch.nan}, heads=("a", "b")))


@pytest.mark.parametrize(
    ("make", "refused"),
    [
        (
            lambda: Declaration(heads=("a", "a")),
            Refusal(
                "heads=('a', 'a') must be different names",
                cause="Two scores of a reward by one name.",
                remedy="give each score one",
            ),
        ),
        (
            lambda: Declaration(heads=("a",), weights=(1.0, 2.0)),
            Refusal(
                "weights=(1.0, 2.0) do not fit heads=('a',)",
                cause="More weights than scores.",
                remedy="give one weight for each head, or none",
            ),
        ),
        (
            lambda: RewardSet.create([returns(SCORES, heads=("a",)), returns(SCORES, heads=("a", "b"))]),
            Refusal(
                "two rewards share a name", cause="Scores of two rewards by one name.", remedy="wrap one in"
            ),
        ),
        (
            lambda: RewardSet.union(
                [RewardSet.create(returns(SCORES, heads=("brightness",))), RewardSet.create(brightness)]
            ),
            Refusal(
                "two rewards share a name", cause="A score named as another reward.", remedy="wrap one in"
            ),
        ),
    ],
)
def test_declarations_that_cannot_be_kept_are_refused(make: Any, refused: Refusal) -> None:
    with refused.raised():
        make()


def test_a_declaration_is_a_declaration() -> None:
    def reward(images: Any, prompts: Any, metadata: Any) -> Any:
        return SCORES

    reward.declaration = {"images": "pil"}  # type: ignore[attr-defined]
    with Refusal(
        "declaration={'images': 'pil'} is a dict",
        cause="A reward's declaration that is something else.",
        remedy="set it to lacfast.rewards.reward.Declaration(...)",
    ).raised():
        RewardSet.create(reward)


def test_the_plan_of_a_run_knows_the_heads_of_rewards_that_are_named() -> None:
    assert declared_heads("shapes") == ("shapes",)
    assert declared_heads("taste=http://gpu1:80") == ("taste",)
    assert declared_heads("unified_reward+http://gpu1/v1") == ("alignment", "coherence", "style")


def test_images_come_as_pillows_for_who_declares_it() -> None:
    seen: list[Any] = []

    @declares(images="pil")
    def judge(images: Any, prompts: list[str], metadata: list[dict[str, Any]]) -> Any:
        seen.extend(images)
        return SCORES

    score(judge)
    assert [picture.mode for picture in seen] == ["RGB", "RGB"]
    assert np.array_equal(np.stack([np.asarray(picture) for picture in seen]), to_uint8(IMAGES))


@pytest.mark.parametrize("form", ["tensor", "pil"])
def test_references_come_in_the_form_of_the_images(form: str, tmp_path: Path) -> None:
    picture = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3))
    picture.save(tmp_path / "a.png")
    other = torch.rand(3, 5, 6, generator=torch.Generator().manual_seed(1))
    seen: list[Any] = []

    @declares(images=form, reference="edited")
    def likeness(images: Any, prompts: list[str], metadata: Any, references: list[Any]) -> Any:
        seen.extend(references)
        return SCORES

    score(likeness, [{"edited": str(tmp_path / "a.png")}, {"edited": other}])
    if form == "pil":
        assert np.array_equal(np.asarray(seen[0]), np.asarray(picture))
        assert np.array_equal(np.asarray(seen[1]), to_uint8(other[None])[0])
    else:
        assert torch.equal(seen[0], torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255)
        assert (seen[1] - other).abs().max() <= 0.5 / 255 + 1e-6


@pytest.mark.parametrize(
    ("metadata", "refused"),
    [
        (
            {},
            Refusal(
                "the metadata of prompt 'p' lack 'edited', the picture to compare with",
                cause="A reward that compares with a picture, and a prompt without one.",
                remedy="give each prompt its path there",
            ),
        ),
        (
            {"edited": "no/such.png"},
            Refusal(
                "there is no file 'no/such.png', the 'edited' of prompt 'p'",
                cause="A prompt whose picture to compare with is not there.",
                remedy="write paths as seen from",
            ),
        ),
    ],
)
def test_prompts_without_their_reference_are_refused_before_any_work(
    metadata: dict[str, Any], refused: Refusal
) -> None:
    rewards = RewardSet.create(returns(SCORES, reference="edited"))
    with refused.raised():
        rewards.require_prompts(PromptSet(["p"], [metadata]))


def test_a_reference_that_is_no_picture_is_an_error_of_the_reward() -> None:
    with Refusal(
        "the reference 'edited' is torch.float32 of shape (2, 2)",
        cause="Numbers in place of a picture to compare with.",
        remedy="give (3, H, W) in [0, 1], an image of Pillow or a path",
        error=RewardError,
    ).raised():
        score(returns(SCORES, reference="edited"), [{"edited": torch.zeros(2, 2)}] * 2)


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (
            torch.tensor([1.0, torch.nan]),
            r"reward 'bad' returned nan for prompts \['one blue square'\].*on_reward_error='skip'",
        ),
        (torch.tensor([torch.inf, 1.0]), r"returned inf for prompts \['one red circle'\]"),
        (
            torch.zeros(3),
            r"returned shape \(3,\) for 2 images, tensor\(\[0., 0., 0.\]\), of prompts \['one red circ",
        ),
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


@pytest.mark.parametrize(
    "returned",
    [
        None,
        "good",
        (score for score in (1.0, 2.0)),
        ([1.0, 2.0], [], {}),
        torch.zeros(2, dtype=torch.complex64),
        [[1.0], [1.0, 2.0]],
    ],
)
def test_what_is_no_tensor_names_the_reward_and_the_remedy(returned: Any) -> None:
    def bad(images: torch.Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Any:
        return returned

    with Refusal(
        "reward 'bad' returned a ",
        cause="A reward that returns None, a string, a generator, three things or a ragged list.",
        remedy="return one number per image, as a tensor, an array or a list",
        error=RewardError,
    ).raised() as caught:
        score(bad)
    told = f"returned a {type(returned).__name__} that is no tensor of numbers, {reprlib.repr(returned)}, for"
    assert f"{told} prompts {PROMPTS}" in str(caught.value)


def test_a_reward_cannot_change_what_others_see() -> None:
    def vandal(images: torch.Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Any:
        images.zero_()
        prompts.reverse()
        metadata[0]["wanted"].append(1)
        metadata[0]["mask"][:] = 1
        return [0.0, 0.0]

    images, prompts = IMAGES.clone(), list(PROMPTS)
    metadata: list[dict[str, Any]] = [{"wanted": [0], "mask": np.zeros(1)}, {}]
    scores = RewardSet.create([vandal, brightness]).score(images, prompts, metadata)
    assert torch.equal(scores["brightness"], brightness(IMAGES, PROMPTS, [{}, {}]))
    assert torch.equal(images, IMAGES)
    assert (prompts, metadata[0]["wanted"], metadata[0]["mask"].tolist()) == (PROMPTS, [0], [0.0])


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_images_that_are_not_finite_are_never_scored(value: float) -> None:
    def asked(images: torch.Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Any:
        raise AssertionError("a reward was asked")

    images = IMAGES.clone()
    images[1, 0, 0, 0] = value
    message = r"sampling or decoding made NaN or infinity in the images of prompts \['one blue square'\]"
    with pytest.raises(NotFiniteError, match=message):
        RewardSet.create(asked).score(images, PROMPTS, [{}, {}])


def test_a_reward_that_raises_is_named_with_its_error() -> None:
    def broken(images: torch.Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> torch.Tensor:
        raise KeyError("aesthetic")

    with Refusal(
        "reward 'broken' raised KeyError: 'aesthetic' for prompts",
        cause="A reward that raises while it scores.",
        remedy="fix the reward, or set on_reward_error='skip' to drop such rollouts",
        error=RewardError,
    ).raised():
        score(broken)
