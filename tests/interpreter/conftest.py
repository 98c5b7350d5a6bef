"""Triton kernels on the CPU: TRITON_INTERPRET=1 python -m pytest tests/interpreter, a process of its own.

Triton reads the variable when it is imported, so a run of all tests cannot turn it on for these.
"""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if IS_INTERPRETED:
        return
    reason = "needs a process of its own: TRITON_INTERPRET=1 python -m pytest tests/interpreter"
    for item in items:
        # This hook sees the whole session's tests.
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture
def poisoned() -> Callable[..., Tensor]:
    """Outputs of NaN inside larger buffers of NaN; at the end all of them is written and nothing else."""
    margin = 64
    buffers: list[tuple[Tensor, int]] = []

    def allocate(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        size = torch.Size(shape).numel()
        buffer = torch.full((margin + size + margin,), torch.nan, dtype=dtype)
        buffers.append((buffer, size))
        return buffer[margin : margin + size].view(shape)

    yield allocate
    for buffer, size in buffers:
        assert buffer[:margin].isnan().all(), "written before the start"
        assert buffer[margin + size :].isnan().all(), "written past the end"
        assert not buffer[margin : margin + size].isnan().any(), "not written everywhere"


@pytest.fixture
def coefficients() -> Tensor:
    """A table with a deterministic row: columns a, b, std."""
    return torch.tensor([[0.98, -0.12, 0.35], [1.0, -0.1, 0.0], [0.91, -0.2, 0.08], [1.05, 0.15, 0.6]])


@pytest.fixture
def steps() -> Tensor:
    """Mixed steps in one batch, the deterministic row 1 among them."""
    return torch.tensor([2, 0, 1, 3])


@pytest.fixture
def key() -> tuple[Tensor, Tensor]:
    """seed (1,) and sample ids (B,) that need all 64 bits."""
    return torch.tensor([-(2**40) - 12345]), torch.tensor([7, 2**40 + 3, 0, 8])


@pytest.fixture
def draw() -> Callable[..., Tensor]:
    """Reproducible normals."""
    generator = torch.Generator().manual_seed(0)

    def normals(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    return normals


@pytest.fixture
def storage_tolerance() -> dict[torch.dtype, float]:
    """Relative error of a stored number: its last place, as the interpreter truncates bfloat16."""
    return {torch.float32: 2e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}
