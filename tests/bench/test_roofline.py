"""Bytes and operations: counted once, by hand here, and stated alike in kernels/README.md."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from bench import roofline
from bench.shapes import CLAIM_LATENT, SELECTIONS, LatentCase, PoolCase, select
from bench.workloads import WORKLOADS

KERNELS_PAGE = Path(__file__).resolve().parents[2] / "kernels" / "README.md"


def test_gaussian_step_moves_what_it_reads_and_writes() -> None:
    # x, v in and x' out, 2 bytes each; the noise is float32.
    assert roofline.elementwise("gaussian_step", 1000, torch.bfloat16, noise="drawn").bytes == 6000
    assert roofline.elementwise("gaussian_step", 1000, torch.bfloat16, noise="given").bytes == 10_000
    assert roofline.elementwise("gaussian_step, guided", 1000, torch.float32, noise="drawn").bytes == 20_000


def test_drawing_noise_costs_operations_and_no_bytes() -> None:
    given, drawn, neither = (
        roofline.elementwise("ppo_loss", 64, torch.float32, noise=noise)
        for noise in ("given", "drawn", "none")
    )
    assert given.bytes - neither.bytes == 4 * 64
    assert drawn.bytes == neither.bytes
    assert drawn.operations - neither.operations == roofline.OPERATIONS_PER_NORMAL * 64


def test_an_anchor_output_is_one_more_read() -> None:
    plain = roofline.elementwise("ppo_loss, backward", 10, torch.bfloat16)
    assert (
        roofline.elementwise("ppo_loss, backward", 10, torch.bfloat16, reference=True).bytes
        == plain.bytes + 20
    )


def test_unknown_noise_is_refused() -> None:
    with pytest.raises(ValueError, match="known: 'given'"):
        roofline.elementwise("gaussian_step", 1, torch.float32, noise="random")


def test_pooling_reads_the_features_once() -> None:
    case = PoolCase("any", 2, 4096, 1536, heads=4)
    features = 2 * 4096 * 1536 * 2
    assert 0 < roofline.value_pool(case, torch.bfloat16).bytes - features < 0.01 * features
    assert 0 < roofline.value_pool_backward(case, torch.bfloat16).bytes - 2 * features < 0.02 * features


def test_bandwidth_is_bytes_over_time() -> None:
    cost = roofline.Cost(3_000_000, 1) + roofline.Cost(1_000_000, 1)
    assert cost.gigabytes_per_second(1e-3) == pytest.approx(4.0)


def test_copy_bandwidth_counts_reads_and_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roofline, "_copy_seconds", lambda source, target: 0.5)
    assert roofline.copy_bandwidth(torch.device("cpu"), num_bytes=1000) == 2 * 1000 / 0.5


def test_copy_bandwidth_of_this_machine_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    # The least that counts as beyond the caches, 64 MiB.
    monkeypatch.setattr(roofline, "cache_bytes", lambda device: 0)
    measured = roofline.copy_bandwidth(torch.device("cpu"), repeats=3)
    assert 1e7 < measured < 1e14


@pytest.mark.parametrize("op", WORKLOADS)
def test_every_provider_of_every_workload_has_a_cost(op: str) -> None:
    entry = WORKLOADS[op]
    (case,) = select(entry.kind, "tiny")
    for dtype in entry.dtypes:
        workload = entry.build(case, dtype, torch.device("cpu"), compiled=False)
        assert set(workload.costs) == set(workload.providers)
        assert all(cost.bytes > 0 and cost.operations > 0 for cost in workload.costs.values())
        assert workload.baseline in workload.providers


@pytest.mark.parametrize("op", WORKLOADS)
def test_claims_are_among_the_real_cases(op: str) -> None:
    assert set(select(WORKLOADS[op].kind, "claim")) <= set(select(WORKLOADS[op].kind, "all"))


def test_unknown_selection_lists_the_known() -> None:
    with pytest.raises(ValueError, match=", ".join(SELECTIONS)):
        select(LatentCase, "huge")
    assert CLAIM_LATENT.elements == 8 * 16 * 64 * 64


def test_kernel_page_states_the_same_reads_and_writes() -> None:
    rows = re.findall(r"^\| `([^`]+)`([^|]*)\| (\d+) \| (\d+) \|", KERNELS_PAGE.read_text(), re.MULTILINE)
    stated = {name + suffix.rstrip(): (int(reads), int(writes)) for name, suffix, reads, writes in rows}
    assert stated == {op: (traffic.reads, traffic.writes) for op, traffic in roofline.TRAFFIC.items()}


def test_the_least_time_is_that_of_each_operand_once() -> None:
    bounds = roofline.least_seconds(1e9, 1e9)
    features = 8 * 1024 * 1536
    memory, arithmetic = bounds["value_pool", "bfloat16"]
    assert memory == pytest.approx((2 * features + 2 * 4 * 8 * 4 * 1536) / 1e9)
    assert arithmetic == pytest.approx(9 * features / 1e9)
    assert bounds["ppo_loss", "float32"][0] == pytest.approx(16 * 8 * 16 * 64 * 64 / 1e9)
    assert bounds["gae", "float32"][0] == pytest.approx(16 * 4096 * 50 / 1e9)


def test_the_table_has_a_row_for_each_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roofline, "copy_bandwidth", lambda device, num_bytes=0: 1e11 if num_bytes else 1e10)
    monkeypatch.setattr(roofline, "multiply_adds_per_second", lambda: 5e10)
    shown = roofline.table(roofline.measure())
    assert "| `ppo_loss`, float32 | 0.84 | 0.08 | " in shown
    assert "10.0 GB/s beyond the caches and 100 GB/s from 2 MiB" in shown
    assert shown.count("\n| `") == len(roofline.least_seconds(1.0, 1.0))
