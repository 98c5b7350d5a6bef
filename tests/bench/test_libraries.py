"""Other projects' functions in the table: called as their users call them, or a reason why they are not."""

from __future__ import annotations

import sys
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import kernels, peers
from bench.shapes import TINY_ADVANTAGE, TINY_POOL
from bench.workloads import WORKLOADS, libraries
from bench.workloads.libraries import LIGER, QUACK, TORCHRL_LOOP, TORCHRL_VECTORIZED
from bench.workloads.workload import OURS, Workload, WrongResultError

FUNCTIONAL = "torchrl.objectives.value.functional"
CPU = torch.device("cpu")


def built(op: str, device: torch.device = CPU) -> Workload:
    case = TINY_ADVANTAGE if op == "gae" else TINY_POOL
    return WORKLOADS[op].build(case, torch.float32, device, compiled=False)


def estimate(
    gamma: float, lmbda: float, state_value: Tensor, next_state_value: Tensor, reward: Tensor, done: Tensor
) -> tuple[Tensor, Tensor]:
    """What torchrl computes: a recursion over dimension -2 that a step that is done starts anew."""
    going = 1.0 - done.to(reward.dtype)
    delta = reward + gamma * going * next_state_value - state_value
    advantages, last = torch.zeros_like(reward), torch.zeros_like(reward[:, 0])
    for t in reversed(range(reward.shape[-2])):
        last = delta[:, t] + gamma * lmbda * going[:, t] * last
        advantages[:, t] = last
    return advantages, advantages + state_value


@pytest.fixture
def torchrl(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    module = SimpleNamespace(
        generalized_advantage_estimate=estimate, vec_generalized_advantage_estimate=estimate
    )
    monkeypatch.setitem(sys.modules, FUNCTIONAL, module)
    return module


def test_both_forms_of_torchrl_are_timed_beside_ours(torchrl: SimpleNamespace) -> None:
    workload = built("gae").checked()
    assert workload.absent == {}
    assert {TORCHRL_LOOP, TORCHRL_VECTORIZED, OURS} <= set(workload.providers)


def test_torchrl_itself_agrees() -> None:
    pytest.importorskip("torchrl", reason="torchrl is not installed")
    workload = built("gae")
    workload.verify()
    assert workload.borrowed == {TORCHRL_LOOP, TORCHRL_VECTORIZED}


def test_a_function_that_fails_or_differs_is_absent_with_its_reason(torchrl: SimpleNamespace) -> None:
    def broken(*_: Any) -> tuple[Tensor, Tensor]:
        raise RuntimeError("only for Hopper\nwith a trace")

    torchrl.generalized_advantage_estimate = broken
    torchrl.vec_generalized_advantage_estimate = lambda *given: tuple(2 * each for each in estimate(*given))
    workload = built("gae")
    with pytest.raises(RuntimeError, match="only for Hopper"):
        workload.verify()
    checked = workload.checked()
    assert checked.absent[TORCHRL_LOOP] == "RuntimeError: only for Hopper"
    assert checked.absent[TORCHRL_VECTORIZED].startswith("WrongResultError: gae, tiny")
    rows = kernels.rows_of(checked, {OURS: {"seconds": 1e-6}}, 1e9)
    assert [row.get("error") for row in rows] == [None, *checked.absent.values()]
    assert "only for Hopper" in kernels.table(rows)


def test_our_own_that_differs_stops_the_workload() -> None:
    workload = built("gae")
    wrong = {OURS: lambda given: tuple(2 * each for each in workload.providers[OURS](given))}
    with pytest.raises(WrongResultError, match="lacfast"):
        replace(workload, providers=workload.providers | wrong).checked()


def test_what_is_not_installed_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch, cuda: Any) -> None:
    monkeypatch.setattr(libraries, "importlib", SimpleNamespace(import_module=_missing))
    assert set(libraries.gae(0.99, 0.95).absent.values()) == {"not installed: pip install torchrl"}
    assert libraries.value_pool(torch.device("cuda")).absent == {
        LIGER: "not installed: pip install liger-kernel",
        QUACK: "not installed: pip install quack-kernels",
    }
    # Their kernels are a GPU's.
    assert libraries.value_pool(CPU) == ({}, {})


def _missing(name: str) -> Any:
    raise ModuleNotFoundError(f"No module named {name!r}", name=name.partition(".")[0])


def test_why_an_import_fails_is_told(monkeypatch: pytest.MonkeyPatch, cuda: Any) -> None:
    def broken(name: str) -> Any:
        if name == "quack":
            raise RuntimeError("no ptxas")
        raise ModuleNotFoundError("No module named 'triton'", name="triton")

    monkeypatch.setattr(libraries, "importlib", SimpleNamespace(import_module=broken))
    absent = libraries.value_pool(torch.device("cuda")).absent
    assert absent[QUACK] == "quack-kernels cannot be imported: RuntimeError: no ptxas"
    assert absent[LIGER] == "liger-kernel cannot be imported: No module named 'triton'"


def test_a_head_with_another_norm_is_the_head(monkeypatch: pytest.MonkeyPatch, cuda: Any) -> None:
    def of_rows(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        assert x.ndim == 2
        return peers.rms_norm(x, weight, eps)

    liger = SimpleNamespace(liger_rms_norm=peers.rms_norm)
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers.functional", liger)
    monkeypatch.setitem(sys.modules, "quack", SimpleNamespace(rmsnorm=of_rows))
    workload = built("value_pool", torch.device("cuda")).checked()
    assert workload.absent == {}
    assert {LIGER, QUACK} <= set(workload.providers)
