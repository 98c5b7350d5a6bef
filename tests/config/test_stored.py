"""Settings survive JSON, and files that an earlier version wrote say the same today."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lacfast.config import (
    DDPO,
    GRPO,
    AdvantageConfig,
    CriticConfig,
    CriticValues,
    Fixed,
    Hold,
    KLMask,
    KLPenalty,
    LoRAConfig,
    Nats,
    PPOConfig,
    Random,
    Ratio,
    SamplerConfig,
    Sliding,
    ValuePretrainingConfig,
    from_json,
    to_json,
)
from lacfast.runs.config import RunConfig
from lacfast.runs.recipes import recipe, recipe_names

EARLIER_RUN = Path(__file__).with_name("earlier_run.json")
"""run.json of `lacfast train shapes` by PPO, before choices were records."""


def through_json(settings: Any) -> Any:
    return from_json(type(settings), json.loads(json.dumps(to_json(settings))))


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_is_the_same_after_json(name: str) -> None:
    settings = recipe(name)
    assert through_json(settings) == settings


@pytest.mark.parametrize(
    "settings",
    [
        PPOConfig(clip=Ratio((1e-4, 2e-4))),
        PPOConfig(clip=Nats(5.0)),
        PPOConfig(clip=KLMask(1e-5)),
        PPOConfig(kl=KLPenalty(0.04, target=1e-3)),
        PPOConfig(hold=Hold(0.01, share=0.5)),
        SamplerConfig(window=Fixed((0, 5))),
        SamplerConfig(window=Random(2, within=(1, 8))),
        SamplerConfig(window=Sliding(4, every=25)),
        CriticConfig(trunk="shared", taps=(0.5, 1.0)),
        LoRAConfig(target_modules=("to_q", "to_k")),
    ],
    ids=repr,
)
def test_settings_with_choices_and_tuples_are_the_same_after_json(settings: Any) -> None:
    assert through_json(settings) == settings


def test_a_run_json_of_an_earlier_version_is_that_recipe() -> None:
    today = recipe("shapes-ppo")
    # It has a hold today, and another name.
    train = replace(today.train, ppo=replace(today.train.ppo, hold=None))
    then = replace(today, out="runs/shapes", train=train)
    assert from_json(RunConfig, json.loads(EARLIER_RUN.read_text(encoding="utf-8"))) == then


@pytest.mark.parametrize(
    ("earlier", "today"),
    [
        ({"clip_range": [1e-4, 2e-4], "clip_nats": None, "kl_threshold": None}, Ratio((1e-4, 2e-4))),
        ({"clip_range": None, "clip_nats": 5.0, "kl_threshold": None}, Nats(5.0)),
        ({"clip_range": None, "clip_nats": None, "kl_threshold": 1e-5}, KLMask(1e-5)),
        ({}, Ratio(1e-4)),
    ],
)
def test_three_bounds_of_which_one_was_set_are_the_clip(earlier: dict[str, Any], today: Any) -> None:
    assert from_json(PPOConfig, earlier).clip == today


@pytest.mark.parametrize(
    ("earlier", "today"),
    [
        ({"window": None, "window_schedule": "fixed", "window_size": 0}, None),
        ({"window": [0, 5]}, Fixed((0, 5))),
        ({"window": [1, 8], "window_schedule": "random", "window_size": 2}, Random(2, within=(1, 8))),
        (
            {"window_schedule": "sliding", "window_size": 4, "window_interval": 25, "window_stride": 2},
            Sliding(4, every=25, stride=2),
        ),
    ],
)
def test_five_options_of_a_window_are_the_window(earlier: dict[str, Any], today: Any) -> None:
    assert from_json(SamplerConfig, earlier) == SamplerConfig(window=today)


@pytest.mark.parametrize(
    ("earlier", "today"),
    [
        ({"kl_weight": 0.0, "kl_target": None, "kl": "exact"}, None),
        ({"kl_weight": 0.04, "kl_target": None, "kl": "flow_grpo"}, KLPenalty(0.04, "flow_grpo")),
        ({"kl_weight": 0.1, "kl_target": 1e-3, "kl": "exact"}, KLPenalty(0.1, target=1e-3)),
        ({}, None),
    ],
)
def test_three_options_of_the_kl_are_its_penalty(earlier: dict[str, Any], today: Any) -> None:
    assert from_json(PPOConfig, earlier).kl == today


def test_what_no_version_knows_is_refused_with_what_to_do() -> None:
    stored = to_json(replace(recipe("shapes-ppo"), out="x"))
    stored["train"]["ppo"]["clip_ratio"] = 1.0
    with pytest.raises(ValueError, match=r"PPOConfig 'clip_ratio'; did you mean 'ratio'\? .*Take it out"):
        from_json(RunConfig, stored)
    with pytest.raises(ValueError, match="unknown choice 'ration'; did you mean 'ratio'"):
        from_json(PPOConfig, {"clip": {"choice": "ration"}})
    with pytest.raises(ValueError, match=r"unknown choice \['ratio'\]"):
        from_json(PPOConfig, {"clip": {"choice": ["ratio"]}})
    with pytest.raises(ValueError, match="Ratio needs clip_range"):
        from_json(PPOConfig, {"clip": {"choice": "ratio"}})
    with pytest.raises(ValueError, match="size=None must be a whole number"):
        from_json(SamplerConfig, {"window_schedule": "sliding"})


def test_what_people_write_has_today_s_spellings_alone() -> None:
    earlier = {"window_schedule": "sliding", "window_size": 4}
    assert from_json(SamplerConfig, earlier).window == Sliding(4, every=1)
    with pytest.raises(ValueError, match="unknown option of SamplerConfig 'window_schedule'"):
        from_json(SamplerConfig, earlier, forgets=False)


@pytest.mark.parametrize(
    ("earlier", "today"),
    [
        ({"estimator": "critic", "group_std": "global", "buffer_size": 16, "min_count": 16}, CriticValues()),
        ({"estimator": "grpo", "group_std": "group", "buffer_size": 16, "min_count": 16}, GRPO(std="group")),
        ({"estimator": "ddpo", "group_std": "global", "buffer_size": 8, "min_count": 4}, DDPO(8, 4)),
    ],
)
def test_options_that_one_estimator_read_are_inside_it(earlier: dict[str, Any], today: Any) -> None:
    assert from_json(AdvantageConfig, earlier) == AdvantageConfig(estimator=today)


def test_an_option_that_is_gone_is_left_out_where_it_said_nothing() -> None:
    assert from_json(ValuePretrainingConfig, {"bound_steps": None}) == ValuePretrainingConfig()
    with pytest.raises(ValueError, match="ValuePretrainingConfig 'bound_steps'"):
        from_json(ValuePretrainingConfig, {"bound_steps": [0, 3]})
