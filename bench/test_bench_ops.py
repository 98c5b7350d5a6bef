"""Every op beside the reference and the peers' formulas: groups of op, case and dtype; see conftest.py."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from bench.shapes import Case
from bench.workloads import WORKLOADS, verified
from lacfast import ops


def test_provider(
    timed: tuple[str, Case, torch.dtype, str], benchmark, is_smoke: bool, request: pytest.FixtureRequest
) -> None:
    op, case, dtype, provider = timed
    workload = verified(op, case, dtype, compiled=not is_smoke)
    benchmark.group = workload.title()
    call = partial(workload.providers[provider], workload.inputs)
    benchmark.extra_info["bytes"] = workload.costs[provider].bytes
    if is_smoke:
        benchmark.pedantic(call, rounds=1, iterations=1)
    else:
        benchmark(call)


def test_every_op_of_the_package_has_a_bench() -> None:
    not_ops = {"available", "backend"}
    # The ratio and its gradient are inside ppo_loss.
    inside_others = {"log_ratio"}
    # A few particles a group: they exist so that the host need not wait, which is no matter of speed.
    never_large = {"effective_sample_size", "systematic_resample"}
    assert set(ops.__all__) - not_ops - inside_others - never_large <= set(WORKLOADS)
