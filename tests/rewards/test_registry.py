"""Rewards are found by name, and nothing unusable that they return is learned from."""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from refusals import Refusal
from tiny_backbones import brightness, tiny_backbone

from lacfast.prompts import PromptSet
from lacfast.rewards.names import registered_rewards
from lacfast.rewards.ocr import OCRAccuracy
from lacfast.rewards.registry import RewardSet
from lacfast.rewards.reward import RewardError
from lacfast.tasks import glyphs, scenes
from lacfast.trainer import LatentActorCriticTrainer

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
    ("reward", "refused"),
    [
        (
            "clipscore",
            Refusal(
                "unknown reward 'clipscore'",
                cause="A reward's name that nothing has.",
                remedy="did you mean 'clip_score'? Known: aesthetic, clip_score",
            ),
        ),
        (
            [],
            Refusal(
                "there is no reward to train on",
                cause="An empty list of rewards.",
                remedy="pass a callable or one of: aesthetic",
            ),
        ),
        ({}, Refusal("there is no reward", cause="No reward at all.", remedy="pass a callable")),
    ],
)
def test_a_reward_that_cannot_be_found_lists_the_known_ones(reward: Any, refused: Refusal) -> None:
    with refused.raised():
        RewardSet.create(reward)


def test_two_rewards_of_one_name_are_refused() -> None:
    with Refusal(
        "two rewards share a name",
        cause="Two functions of one name, such as two lambdas.",
        remedy="wrap one in a function of another name",
    ).raised():
        RewardSet.create([lambda images, prompts, metadata: [0, 0], lambda images, prompts, metadata: [1, 1]])


def test_every_registered_name_is_made_without_loading_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    # The only one that needs a package of its own.
    package = ModuleType("rapidocr")
    package.__spec__ = ModuleSpec("rapidocr", None)
    monkeypatch.setitem(sys.modules, "rapidocr", package)
    for name in registered_rewards():
        rewards = RewardSet.create({name: 0.5})
        assert rewards.names == [name]
        assert callable(rewards.functions[name])


def test_a_package_that_is_installed_after_the_first_search_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert RewardSet.create("shapes").names == ["shapes"]
    (tmp_path / "later-1.dist-info").mkdir()
    (tmp_path / "later-1.dist-info" / "entry_points.txt").write_text(
        "[lacfast.rewards]\nlater = tiny_backbones:brightness\n", encoding="utf-8"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert RewardSet.create("later").names == ["later"]


def test_the_documentation_lists_every_registered_name() -> None:
    table = (Path(__file__).parents[2] / "docs" / "rewards.md").read_text(encoding="utf-8")
    rows = "\n".join(line for line in table.splitlines() if line.startswith("| `"))
    assert [name for name in registered_rewards() if f"`{name}`" not in rows] == []


def test_a_callable_of_ones_own_may_be_named_by_its_module() -> None:
    rewards = RewardSet.create("tiny_backbones:brightness")
    assert rewards.names == ["brightness"]
    assert torch.equal(
        rewards.score(IMAGES, PROMPTS, [{}, {}])["brightness"], brightness(IMAGES, PROMPTS, [{}, {}])
    )


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory, with modules in it that the path does not know."""
    for name, source in {
        "own_good": "def ok(images, prompts, metadata):\n    return [1.0] * len(prompts)\nNUMBER = 3\n"
        "class Needs:\n    def __init__(self, size):\n        pass\n",
        "own_syntax": "def ok(:\n",
        "own_import": "import no_such_package.part\n",
        "own_raise": "x = 1\nraise KeyError('weights')\n",
    }.items():
        (tmp_path / f"{name}.py").write_text(source)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return tmp_path


def test_a_module_of_the_current_directory_is_found(modules: Path) -> None:
    assert str(modules) not in sys.path
    assert score("own_good:ok")["ok"].tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    ("location", "refusal"),
    [
        (
            "no_such_module:reward",
            Refusal(
                "reward 'no_such_module:reward' cannot be imported: there is no module 'no_such_module' in",
                cause="A reward in a module that is neither installed nor in the current directory.",
                remedy="start in its directory, or install its package",
            ),
        ),
        (
            "own_good:okay",
            Refusal(
                "unknown name in module 'own_good' 'okay'; did you mean 'ok'?",
                cause="A reward that its module does not have.",
                remedy="Known: ok, Needs",
            ),
        ),
        (
            "own_syntax:ok",
            Refusal(
                "reward 'own_syntax:ok' cannot be imported: invalid syntax",
                cause="A reward of one's own with a syntax error.",
                remedy="own_syntax.py, line 1; mend it there",
            ),
        ),
        (
            "own_import:ok",
            Refusal(
                "its module needs 'no_such_package', which is not installed",
                cause="A reward of one's own that imports what is not installed.",
                remedy="pip install no_such_package",
            ),
        ),
        (
            "own_raise:ok",
            Refusal(
                "reward 'own_raise:ok' cannot be imported: KeyError: 'weights' in",
                cause="A reward of one's own whose module fails while it is imported.",
                remedy="own_raise.py, line 2; mend it there",
            ),
        ),
        (
            "own_good:Needs",
            Refusal(
                "reward 'own_good:Needs' cannot be made without settings",
                cause="A class of rewards that cannot be made without arguments.",
                remedy="give them defaults, or pass an instance in Python",
            ),
        ),
        (
            "own_good:NUMBER",
            Refusal(
                "reward 'own_good:NUMBER' is a int, which cannot be called",
                cause="The name of something that is no reward.",
                remedy="write a function of (images, prompts, metadata)",
            ),
        ),
    ],
)
def test_what_cannot_be_imported_says_why(modules: Path, location: str, refusal: Refusal) -> None:
    with refusal.raised():
        RewardSet.create(location)


def test_a_trainer_asks_for_what_its_rewards_need_before_any_work() -> None:
    class Judge:
        name = "judge"

        def check(self) -> None:
            told.append("check")

        def prepare(self) -> None:
            told.append("prepare")
            raise FileNotFoundError("judge.safetensors")

        def __call__(self, images: torch.Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Any:
            raise AssertionError("was asked for scores")

    told: list[str] = []
    with pytest.raises(RewardError, match="reward 'judge' cannot be loaded: FileNotFoundError"):
        LatentActorCriticTrainer(tiny_backbone("dit"), Judge(), ["one red circle"])
    assert told == ["check", "prepare"]


def test_an_object_may_say_its_name() -> None:
    class Judge:
        name = "taste"

        def __call__(self, images: torch.Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Any:
            return [1.0] * len(prompts)

    assert RewardSet.create(Judge()).names == ["taste"]


def test_a_union_scores_once_what_two_sets_share() -> None:
    def dark(images: torch.Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Any:
        return 1 - brightness(images, prompts, metadata)

    union = RewardSet.union([RewardSet.create({brightness: 2.0}), RewardSet.create([brightness, dark])])
    assert union.names == ["brightness", "dark"]
    assert union.weights.tolist() == [2.0, 1.0]


UNJUDGED = {
    "shapes": (
        {"kind": "count"},
        Refusal(
            "reward 'shapes' cannot judge prompt 'one red square': its metadata lack 'objects'",
            cause="The checker of shapes is given prompts of one's own.",
            remedy="take the prompts of the task",
        ),
    ),
    "shapes_gold": (
        {"kind": "heap", "objects": []},
        Refusal(
            "unknown kind of prompt 'heap'",
            cause="The metadata name a kind of prompt that no checker knows.",
            remedy="known: count, both, left_of, above",
        ),
    ),
    "glyphs": (
        {},
        Refusal(
            "reward 'glyphs' cannot judge prompt 'one red square': its metadata lack 'word'",
            cause="The reader of words is given prompts of one's own.",
            remedy="take the prompts of the task",
        ),
    ),
}


@pytest.mark.parametrize(("name", "metadata", "refusal"), [(name, *row) for name, row in UNJUDGED.items()])
def test_a_prompt_that_a_reward_cannot_judge_is_refused(
    name: str, metadata: dict[str, Any], refusal: Refusal
) -> None:
    with refusal.raised():
        RewardSet.create(name).require_prompts(PromptSet(["one red square"], [metadata]))


def test_every_reward_of_a_task_tells_what_it_needs_of_its_prompts() -> None:
    for task, sources in (("shapes", scenes.TASK), ("glyphs", glyphs.TASK)):
        names = [name for name in registered_rewards() if name.startswith(task) and name != "shapes_height"]
        assert len(names) >= 3
        for name in names:
            scorer = RewardSet.create(name)
            scorer.require_prompts(PromptSet.create(sources.split()[0]))
            with pytest.raises(ValueError, match="its metadata lack"):
                scorer.require_prompts(PromptSet.create(["a cat"]))


def test_the_text_to_read_is_asked_for_before_any_image() -> None:
    scorer = RewardSet.create([OCRAccuracy(engine=lambda pixels: [])])
    scorer.require_prompts(PromptSet.create(['a sign that says "open"']))
    with Refusal(
        "reward 'ocr' cannot judge prompt 'a sign': no text to read",
        cause="An OCR reward is given a prompt that quotes no text.",
        remedy="put it in double quotes",
    ).raised():
        scorer.require_prompts(PromptSet.create(["a sign"]))
