"""A run's memory is planned once for the same settings: a plan is most of the time that a tiny run takes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from lacfast.runs import train
from lacfast.runs.capacity import MemoryPlan
from lacfast.runs.config import RunConfig
from lacfast.runs.plan import planned_memory

_PLANS: dict[str, MemoryPlan] = {}


@pytest.fixture(autouse=True)
def planned_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def planned(config: RunConfig, **situation: Any) -> MemoryPlan:
        key = repr((replace(config, out="anywhere"), situation))
        if key not in _PLANS:
            _PLANS[key] = planned_memory(config, **situation)
        return _PLANS[key]

    monkeypatch.setattr(train, "planned_memory", planned)
