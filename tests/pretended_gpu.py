"""A pytest plugin: the tests that need a GPU, on a pretended one.

PYTHONPATH=tests python -m pytest -m gpu -p pretended_gpu tests/test_gpu*.py
With --launches every Triton kernel is compiled and launched too, for a driver that only keeps the launch.
With --source-tree there is no CUDA C++, as where nothing is installed.
"""

from __future__ import annotations

from contextlib import ExitStack

import pytest
from pretended_cuda import pretended_cuda

UNSEEN = {
    "test_auto_captures_what_launches_bound_and_nothing_else": "compares times",
    "test_a_step_beyond_the_table_writes_nothing_into_the_slab": "is of a kernel; the CPU's raises",
}
"""Tests of what no pretended device has, and what that is."""

_device = ExitStack()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--launches", action="store_true", help="compile and launch Triton kernels, for nothing")
    parser.addoption("--source-tree", action="store_true", help="ops of CUDA C++ run their reference")


def pytest_configure(config: pytest.Config) -> None:
    recorder = None
    if config.getoption("--launches"):
        # Triton is not installed everywhere.
        from recorded_launches import LaunchRecorder

        recorder = LaunchRecorder()
    has_cuda_kernels = not config.getoption("--source-tree")
    _device.enter_context(pretended_cuda(recorder, has_cuda_kernels=has_cuda_kernels))


def pytest_unconfigure() -> None:
    _device.close()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.name in UNSEEN:
            item.add_marker(pytest.mark.skip(reason=UNSEEN[item.name]))
