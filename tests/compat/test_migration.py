"""The migration page keeps its word: its new lines import, its settings exist, its figures were measured."""

from __future__ import annotations

import json
import re
from dataclasses import fields
from pathlib import Path

import pytest

from bench.compat_steps import BEGIN, END, table
from lacfast.compat.trl import DDPOConfig
from lacfast.config import PPOConfig, SamplerConfig, TrainConfig

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "migration.md").read_text(encoding="utf-8")
IMPORTS = re.findall(r"(?:^|`)(from lacfast[^`\n]*)", PAGE, re.MULTILINE)


@pytest.mark.parametrize("line", IMPORTS)
def test_every_new_line_imports(line: str) -> None:
    exec(line, {})


def test_every_peers_function_has_a_new_line() -> None:
    imported = {name for line in IMPORTS for name in re.findall(r"import (\w+)", line)}
    assert imported >= {
        "sde_step_with_logprob",
        "sde_step_with_logprob_v1",
        "ddim_step_with_logprob",
        "pipeline_with_logprob",
        "PerPromptStatTracker",
        "DDPOConfig",
    }


def test_every_setting_of_trl_is_on_the_page() -> None:
    section = PAGE.partition("## 3.")[2].partition("## 4.")[0]
    patterns = [name.replace("*", ".*") for name in re.findall(r"[a-z0-9_]+\*?", section)]
    # Names that only label a run.
    labels = {"exp_name", "run_name", "tracker_project_name"}
    missing = [
        field.name
        for field in fields(DDPOConfig)
        if field.name not in labels and not any(re.fullmatch(pattern, field.name) for pattern in patterns)
    ]
    assert missing == []


def test_the_named_settings_of_ours_exist() -> None:
    for owner in (PPOConfig, SamplerConfig, TrainConfig):
        known = {field.name for field in fields(owner)} | {"stochastic_window"}
        named = set(re.findall(rf"`{owner.__name__}\.(\w+)", PAGE))
        assert named
        assert named <= known


def test_the_figures_are_the_recorded_ones() -> None:
    recorded = json.loads((ROOT / "bench" / "results" / "compat.json").read_text(encoding="utf-8"))
    assert PAGE.partition(BEGIN)[2].partition(END)[0] == table(recorded["rows"])
