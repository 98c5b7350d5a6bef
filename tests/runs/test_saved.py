"""A saved model is found in a run's directory, whose settings say how to sample and what is valued."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from refusals import Refusal

from lacfast.backbones import load_backbone
from lacfast.checkpoint import CRITIC_WEIGHTS
from lacfast.config import AdvantageConfig, Fixed, SamplerConfig, TrainConfig, to_json
from lacfast.rewards.heads import RewardHeads
from lacfast.runs.saved import evaluation_sampler, saved_model, trained_heads, trained_sampler

TRAINED = SamplerConfig(num_steps=4, noise_level=0.5, guidance_scale=4.5, window=Fixed((0, 3)))
EVALUATED = SamplerConfig(kind="ode", num_steps=6, noise_level=0.0, guidance_scale=4.5)


def run_of(directory: Path, **settings: Any) -> str:
    """A run's best checkpoint, nothing but its place."""
    best = directory / "checkpoints" / "best"
    best.mkdir(parents=True)
    (directory / "run.json").write_text(json.dumps(settings), encoding="utf-8")
    return str(best)


def test_a_run_stands_for_its_best_checkpoint(tmp_path: Path) -> None:
    best = run_of(tmp_path / "run", train={})
    assert saved_model(str(tmp_path / "run")) == saved_model(best) == best
    assert saved_model("stabilityai/stable-diffusion-3.5-medium") == "stabilityai/stable-diffusion-3.5-medium"
    (tmp_path / "new" / "checkpoints").mkdir(parents=True)
    with Refusal(
        "has no checkpoint yet",
        cause="A run that was stopped before it saved anything is steered or evaluated.",
        remedy="train it, or pass a saved model",
    ).raised():
        saved_model(str(tmp_path / "new"))


def test_a_best_checkpoint_that_a_kill_left_aside_is_put_back(tmp_path: Path) -> None:
    """`lacfast evaluate RUN` after a kill between the two renames of a save."""
    best = Path(run_of(tmp_path / "run", train={}))
    (best.parent / "00000010").mkdir()
    best.rename(best.with_name(".best.0123abcd.replaced"))
    assert saved_model(str(tmp_path / "run")) == str(best)
    best.rename(best.with_name(".best.0123abcd.replaced"))
    with pytest.raises(ValueError, match="best holds no model_index"):
        load_backbone(best)
    assert best.is_dir()


@pytest.mark.parametrize("eval_sampler", [None, EVALUATED], ids=["training's", "its own"])
def test_samplers_are_those_of_the_run_guidance_included(
    eval_sampler: SamplerConfig | None, tmp_path: Path
) -> None:
    train = to_json(TrainConfig(sampler=TRAINED, eval_sampler=eval_sampler))
    best = run_of(tmp_path, train=json.loads(json.dumps(train)))
    assert trained_sampler(best) == trained_sampler(str(Path(best) / CRITIC_WEIGHTS)) == TRAINED
    assert evaluation_sampler(best) == (eval_sampler or TRAINED)


def test_a_sampler_of_an_earlier_version_is_read_and_none_is_none(tmp_path: Path) -> None:
    earlier = {"kind": "flow_sde", "num_steps": 4, "noise_level": 0.5, "shift": 1.0, "window": [0, 3]}
    best = run_of(tmp_path / "run", train={"sampler": earlier})
    expected = SamplerConfig(num_steps=4, noise_level=0.5, window=Fixed((0, 3)))
    assert trained_sampler(best) == evaluation_sampler(best) == expected
    assert trained_sampler(str(tmp_path)) is evaluation_sampler(str(tmp_path)) is None
    assert trained_heads(str(tmp_path)) is None


def test_a_run_says_of_a_critic_what_its_file_does_not(tmp_path: Path) -> None:
    gate = AdvantageConfig(combination="conditional", conditions=(("easy", "ocr", 0.5),))
    rewards = [["ocr", 1.0], ["my.rewards:easy", -0.25], ["http://127.0.0.1:80/score", 2.0]]
    train = to_json(TrainConfig(advantages=gate))
    best = run_of(tmp_path, rewards=rewards, train=json.loads(json.dumps(train)))
    expected = RewardHeads(
        ("ocr", "easy", "http://127.0.0.1:80/score"),
        (1.0, -0.25, 2.0),
        "conditional",
        (("easy", "ocr", 0.5),),
    )
    assert trained_heads(best) == expected
