"""The recipes fit the GPUs that they are for, and what is recorded of them is what is planned."""

from __future__ import annotations

import json

import pytest

from bench import memory
from lacfast.runs.capacity import GPU_BYTES

RECORDED = json.loads(memory.RESULT.read_text(encoding="utf-8"))
TOO_LARGE = {"dance-grpo-hpsv2"}
"""Recipes that train all weights of FLUX; with a LoRA they are another."""
SMALLER = {"flux-pickscore-24gb": 24 * 2**30}
"""Recipes for another GPU than one of 80 GB -> its bytes."""


def test_every_recipe_is_recorded() -> None:
    assert RECORDED.keys() == memory.configurations().keys()


@pytest.mark.parametrize("name", RECORDED)
def test_a_recipe_fits_its_gpu_or_says_with_what_it_does(name: str) -> None:
    peak = max(phase["device"] for phase in RECORDED[name]["phases"])
    assert (peak > SMALLER.get(name, GPU_BYTES)) == (name in TOO_LARGE)
    assert name not in TOO_LARGE or f"{name}-lora" in RECORDED


def test_a_recipe_fitted_no_gpu_before_its_rollouts_lay_on_the_host() -> None:
    assert RECORDED["sd35m-ocr"]["before"]["value pretraining"] > GPU_BYTES


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ddpo-compressibility", "sd15-ddpo"])
def test_what_is_recorded_is_what_is_planned(name: str) -> None:
    assert memory.measure(memory.configurations()[name]) == RECORDED[name], "python -m bench.memory"
