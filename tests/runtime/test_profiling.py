"""Spans: free without NVTX, recorded where somebody looks, invisible to torch.compile."""

from __future__ import annotations

import ast
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny_backbones
import torch

from lacfast import LatentActorCriticTrainer
from lacfast.runtime.profiling import DOMAIN, SPANS, each, nvtx_spans, recorded_by_torch, span

PACKAGE = Path(__file__).resolve().parents[2] / "lacfast"


class Domain:
    """Stands in for nvtx's, which does nothing unless a profiler is attached."""

    def __init__(self) -> None:
        self.open: list[str] = []
        self.closed: list[str] = []
        self.made = 0

    def get_event_attributes(self, message: str) -> str:
        self.made += 1
        return message

    def push_range(self, attributes: str) -> None:
        self.open.append(attributes)

    def pop_range(self) -> None:
        self.closed.append(self.open.pop())


def names_in(package: Path) -> set[str]:
    """First arguments of every call of span and each."""
    return {
        node.args[0].value
        for path in package.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id in ("span", "each")
        and isinstance(node.args[0], ast.Constant)
    }


def test_every_span_is_used_and_every_use_is_known() -> None:
    assert names_in(PACKAGE) == set(SPANS)


def test_nvtx_ranges_are_made_once_and_nest() -> None:
    domain = Domain()
    spans = nvtx_spans(SimpleNamespace(get_domain=lambda name: domain if name == DOMAIN else None))
    for _ in range(3):
        with spans["decode"], spans["reward"], spans["decode"]:
            assert domain.open == ["decode", "reward", "decode"]
    assert domain.made == len(SPANS)
    assert domain.open == []


def test_ranges_close_when_the_work_fails() -> None:
    domain = Domain()
    spans = nvtx_spans(SimpleNamespace(get_domain=lambda _: domain))
    with pytest.raises(ZeroDivisionError), spans["sync"]:
        _ = 1 // 0
    assert domain.closed == ["sync"]


def test_without_nvtx_a_span_does_nothing() -> None:
    spans = nvtx_spans(None)
    with spans["optimizer"], spans["optimizer"]:
        pass
    assert set(spans) == set(SPANS)


def test_unknown_name_is_refused() -> None:
    with pytest.raises(KeyError):
        span("rollout")


def test_spans_leave_compiled_code_whole() -> None:
    def step(x: torch.Tensor) -> torch.Tensor:
        with span("rollout/step"):
            x = 2 * x
        for part in each("update/microbatch", [1.0, 2.0]):
            x = x + part
        return x

    compiled = torch.compile(step, fullgraph=True, backend="eager")
    assert torch.equal(compiled(torch.ones(3)), torch.full((3,), 5.0))


def test_torch_profiler_sees_every_part_of_an_iteration() -> None:
    config = tiny_backbones.tiny_config()
    trainer = LatentActorCriticTrainer(
        tiny_backbones.tiny_backbone("dit"), tiny_backbones.brightness, tiny_backbones.PROMPTS, config
    )
    with torch.profiler.profile() as profile, recorded_by_torch():
        trainer.train_iteration()
    counts = {event.key: event.count for event in profile.key_averages()}
    # Rewards are scored in another thread, which this profiler does not look at.
    assert {f"{DOMAIN}/{name}" for name in SPANS if name != "reward"} <= set(counts)
    assert counts[f"{DOMAIN}/rollout/step"] == trainer.table.num_steps
