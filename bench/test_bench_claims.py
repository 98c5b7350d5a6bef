"""The claims of kernel_claims.py, measured: one CPU thread, interleaved, at the claim's sizes.

python -m pytest bench -m claim -s
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from bench.kernel_claims import CLAIMS
from bench.workloads import WORKLOADS

CASES = [(op, dtype) for op in dict.fromkeys(op for op, _ in CLAIMS) for dtype in WORKLOADS[op].dtypes]


@pytest.mark.claim
@pytest.mark.parametrize(("op", "dtype"), CASES, ids=str)
def test_an_op_is_as_fast_as_claimed(
    op: str, dtype: torch.dtype, claimed_ratios: Callable[[str, torch.dtype], dict[str, float]]
) -> None:
    ratios = claimed_ratios(op, dtype)
    slower = {
        provider: ratios[provider]
        for (name, provider), floor in CLAIMS.items()
        if name == op and ratios[provider] < floor
    }
    assert not slower, f"times as fast as the baseline; claimed: {CLAIMS}"
