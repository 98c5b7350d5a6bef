"""What tests share: the process they run in, and the backends that an op is tested on.

Nothing heavy is imported before tests are collected: the process that starts workers would wait for it,
and they for that process.
"""

from __future__ import annotations

import gc
import os
import signal
import tempfile
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from host_waits import WaitLog
    from torch import Tensor

# Before Hugging Face is imported: nothing that a test keeps lies among the user's own files.
ASSETS = tempfile.TemporaryDirectory(prefix="lacfast-assets-")
os.environ["HF_ASSETS_CACHE"] = ASSETS.name

# A shell lets what it runs in the background ignore Ctrl-C, nohup the end of a terminal: tests that send them
# would fail or wait for ever.
for sent, usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(sent) == signal.SIG_IGN:
        signal.signal(sent, usual)

# Searching for cycles after every 700 objects, as Python does, takes up to a tenth of the tests' time.
gc.set_threshold(50_000, 20, 100)


@pytest.fixture
def assert_near() -> Callable[[Tensor, Tensor], None]:
    """assert_near(actual, expected): within the tolerance of actual's dtype of a float64 value."""
    import torch
    from tolerances import TOLERANCES

    def check(actual: Tensor, expected: Tensor) -> None:
        tolerance = TOLERANCES[actual.dtype]
        torch.testing.assert_close(
            actual.double(), expected.double(), rtol=tolerance.relative, atol=tolerance.absolute
        )

    return check


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    import torch

    # A second thread on busy cores makes every small test slower.
    torch.set_num_threads(1)
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="needs a CUDA device")
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(skip)


def pytest_collection_finish() -> None:
    # The half million objects of torch and diffusers outlive every test: a collection that walks over them
    # takes a quarter of a second, and in a forked rank it copies their pages.
    gc.collect()
    gc.freeze()


def _backends() -> list[str]:
    # The interpreter replaces Triton for a whole process, and the others have been run in one without it.
    return ["triton"] if os.environ.get("TRITON_INTERPRET") == "1" else ["reference", "cpu"]


@pytest.fixture(params=_backends())
def backend_name(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test's ops on every backend of this process."""
    from lacfast import ops

    with ops.backend(request.param):
        yield request.param


@pytest.fixture(autouse=True, scope="session")
def no_waits_for_the_disk() -> Iterator[None]:
    """A save of a test need not outlive a power cut: some milliseconds for each of its files."""
    from lacfast.runtime import directories

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(directories, "_sync", lambda path: None)
        yield


@pytest.fixture
def cuda() -> Iterator[WaitLog]:
    """A CUDA device that is pretended; gives the log of the host's waits for it."""
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device, so none is pretended")
    # What the other tests need not import.
    from pretended_cuda import pretended_cuda

    with pretended_cuda() as waits:
        yield waits


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """torch fills what it would leave uninitialised with NaN, so that an element nobody wrote is seen."""
    import torch

    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
