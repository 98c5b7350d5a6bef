"""A study is named by what it sets: options that are added later, at their defaults, do not rename it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from bench.learning import units
from lacfast.config import CriticConfig, TrainConfig
from lacfast.runs import presets


@dataclass(frozen=True)
class _Inner:
    rate: float = 0.1


@dataclass(frozen=True)
class _InnerLater:
    rate: float = 0.1
    new: int = 1


@dataclass(frozen=True)
class _Outer:
    inner: _Inner | _InnerLater = field(default_factory=_Inner)
    count: int = 3


@dataclass(frozen=True)
class _OuterLater(_Outer):
    inner: _Inner | _InnerLater = field(default_factory=_InnerLater)
    other: str = "a"


def test_only_what_differs_counts_at_any_depth() -> None:
    assert units.changed(_Outer()) == {}
    assert units.changed(_Outer(_Inner(0.2))) == {"inner": {"rate": 0.2}}
    assert units.changed(_OuterLater(_InnerLater(0.2))) == units.changed(_Outer(_Inner(0.2)))
    assert units.changed(_OuterLater(other="b")) == {"other": "b"}


def test_every_setting_of_a_run_changes_its_name() -> None:
    preset = presets.shapes("dit")
    other = replace(preset, critic=replace(preset.critic, hidden_dim=64))
    names = {units.digest(units.changed(config)) for config in (preset, other, TrainConfig())}
    assert len(names) == 3
    # What a configuration sets by itself is no difference.
    assert units.changed(TrainConfig(critic=CriticConfig())) == {}
