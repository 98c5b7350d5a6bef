"""Spans: free without NVTX, recorded where somebody looks, invisible to torch.compile."""

from __future__ import annotations

import ast
import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import pytest
import tiny_backbones
import torch

from lacfast import LatentActorCriticTrainer
from lacfast.runtime.profiling import (
    DOMAIN,
    SPANS,
    Spans,
    _default_spans,
    each,
    nvtx_spans,
    recorded_by_torch,
    span,
)

PACKAGE = Path(__file__).resolve().parents[2] / "lacfast"


class Package:
    """Stands in for nvtx, which does nothing unless a profiler is attached."""

    def __init__(self) -> None:
        self.open: list[str] = []
        self.closed: list[str] = []
        self.made = 0

    def annotate(self, message: str, *, domain: str) -> AbstractContextManager[None]:
        assert domain == DOMAIN
        self.made += 1
        package = self

        class Range(AbstractContextManager[None]):
            def __enter__(self) -> None:
                package.open.append(message)

            def __exit__(self, *exception: object) -> None:
                package.closed.append(package.open.pop())

        return Range()


def names_in(package: Path) -> set[str]:
    """First arguments of every call of span and each, and of the room that is handed span."""
    return {
        node.args[0].value
        for path in package.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
        and ast.unparse(node.func) in ("span", "each", "self._named")
        and isinstance(node.args[0], ast.Constant)
    }


def test_every_span_is_used_and_every_use_is_known() -> None:
    assert names_in(PACKAGE) == set(SPANS)


def spans_in(package: Package, monkeypatch: pytest.MonkeyPatch) -> Spans:
    """The ranges of this package in nvtx's place."""
    monkeypatch.setitem(sys.modules, "nvtx", package)
    return nvtx_spans()


def test_nvtx_ranges_are_made_once_and_nest(monkeypatch: pytest.MonkeyPatch) -> None:
    package = Package()
    spans = spans_in(package, monkeypatch)
    for _ in range(3):
        with spans["decode"], spans["reward"], spans["decode"]:
            assert package.open == ["decode", "reward", "decode"]
    assert package.made == len(SPANS)
    assert package.open == []


def test_ranges_close_when_the_work_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    package = Package()
    spans = spans_in(package, monkeypatch)
    with pytest.raises(ZeroDivisionError), spans["sync"]:
        _ = 1 // 0
    assert package.closed == ["sync"]


def test_without_the_nvtx_package_a_span_does_nothing_on_a_gpu_too(monkeypatch: pytest.MonkeyPatch) -> None:
    # None in sys.modules is an ImportError.
    monkeypatch.setitem(sys.modules, "nvtx", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    _default_spans.cache_clear()
    try:
        assert {type(span(name)) for name in SPANS} == {nullcontext}
        with span("optimizer"), span("optimizer"):
            pass
    finally:
        _default_spans.cache_clear()


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
    # Rewards are scored in another thread, which this profiler does not look at; one rank sums with no other.
    elsewhere = {"reward", "update/all_reduce", "rollout/order", "rollout/wait", "rollout/send"}
    # Shards, and an objective on the forward process.
    elsewhere |= {"shard/gather", "shard/sum", "rollout/renoising", "update/old_outputs"}
    assert {f"{DOMAIN}/{name}" for name in SPANS if name not in elsewhere} <= set(counts)
    assert counts[f"{DOMAIN}/rollout/step"] == trainer.table.num_steps
