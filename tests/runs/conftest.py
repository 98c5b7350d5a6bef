"""A run's memory is planned once for the same settings: a plan is most of the time that a tiny run takes."""

from __future__ import annotations

from typing import Any

import pytest

from lacfast.runs import train
from lacfast.runs.capacity import MemoryPlan
from lacfast.runs.config import RunConfig
from lacfast.runs.plan import planned_memory

_PLANS: dict[str, MemoryPlan] = {}
ASIDE = {
    "out",
    "prompts",
    "held_out",
    "save_every",
    "keep_last",
    "best",
    "resume",
    "tensorboard",
    "wandb_project",
}
"""Settings that no plan reads."""


def key_of(config: RunConfig, situation: dict[str, Any]) -> str:
    train = {name: value for name, value in vars(config.train).items() if name != "iterations"}
    others = {name: value for name, value in vars(config).items() if name not in {"train", *ASIDE}}
    return repr((train, others, situation))


@pytest.fixture(autouse=True)
def planned_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def planned(config: RunConfig, **situation: Any) -> MemoryPlan:
        key = key_of(config, situation)
        if key not in _PLANS:
            _PLANS[key] = planned_memory(config, **situation)
        return _PLANS[key]

    monkeypatch.setattr(train, "planned_memory", planned)
