"""The ratios that the README states, asserted: one CPU thread, interleaved, at the claim's sizes.

python -m pytest bench -m claim -s
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from bench.workloads import STORAGE
from bench.workloads.workload import OURS

pytestmark = pytest.mark.claim
Ratios = Callable[[str, torch.dtype], dict[str, float]]


@pytest.mark.parametrize("dtype", STORAGE, ids=str)
@pytest.mark.parametrize("op", ["gaussian_step", "step_log_prob", "ppo_loss", "value_pool"])
def test_op_is_twice_as_fast_as_the_compiled_peer(
    op: str, dtype: torch.dtype, claimed_ratios: Ratios
) -> None:
    assert claimed_ratios(op, dtype)[OURS] >= 2


def test_gae_is_fifteen_times_as_fast_as_the_python_loop(claimed_ratios: Ratios) -> None:
    assert claimed_ratios("gae", torch.float32)[OURS] >= 15


def test_the_advantage_pipeline_is_twice_as_fast_as_the_compiled_formula(claimed_ratios: Ratios) -> None:
    assert claimed_ratios("normalized_advantages", torch.float32)[OURS] >= 2
