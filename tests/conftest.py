"""What tests share: how close is close, per dtype, and the backends that an op is tested on."""

from __future__ import annotations

import gc
import os
import signal
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import pytest
import torch
from host_waits import WaitLog
from torch import Tensor

from lacfast import ops
from lacfast.runtime import directories

# Before Hugging Face is imported: nothing that a test keeps lies among the user's own files.
ASSETS = tempfile.TemporaryDirectory(prefix="lacfast-assets-")
os.environ["HF_ASSETS_CACHE"] = ASSETS.name

# A shell lets what it runs in the background ignore Ctrl-C: tests that send it would fail or wait for ever.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Searching for cycles after every 700 objects, as Python does, takes up to a tenth of the tests' time.
gc.set_threshold(50_000, 20, 100)

# A second thread on busy cores makes every small test slower.
torch.set_num_threads(1)


@dataclass(frozen=True)
class Tolerance:
    relative: float
    absolute: float


# Against a float64 reference of the same stored inputs: maths in float32 (float64), one rounding at the end.
TOLERANCES = {
    # A few roundings of 6e-8 each, and sums of thousands of terms with block-wise float32 accumulation.
    torch.float32: Tolerance(2e-5, 2e-6),
    # One rounding to 8 bits of mantissa: 2^-9 of the value, 2^-8 where it falls the other way.
    torch.bfloat16: Tolerance(2**-8, 2**-10),
    # One rounding to 11 bits, and subnormals below 6e-5.
    torch.float16: Tolerance(2**-10, 2**-13),
    # Order of summation only.
    torch.float64: Tolerance(1e-11, 1e-12),
}

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if IS_INTERPRETED:
    # Triton's interpreter truncates bfloat16 stores; the GPU rounds to nearest.
    TOLERANCES[torch.bfloat16] = Tolerance(2**-7, 2**-9)

STORAGE_DTYPES = tuple(TOLERANCES)


# Of the size of the terms. Another batch size or another CPU takes another kernel for a product of matrices,
# which adds the same float32 terms, each rounded by 6e-8, in another order; layers and steps carry it on.
REORDERED = 1e-5


def assert_same_sum(actual: Tensor | float, expected: Tensor | float, *, unit: Tensor | float) -> None:
    """Two sums of the same terms in another order: within `REORDERED` of `unit`, the size of what is added.

    Digits relative to the sum itself mean nothing where terms cancel: a policy loss of 2e-5 is a mean of
    normalised advantages, so its unit is 1, their size. That of a cosine or a value is what it ranges over.
    """
    difference = float((torch.as_tensor(actual).double() - torch.as_tensor(expected).double()).abs().max())
    assert difference <= REORDERED * unit, f"{difference:.2e} apart, of terms of size {float(unit):.2e}"


def assert_same_step(
    actual: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    before: Mapping[str, Tensor],
) -> None:
    """Weights after the same optimizer steps from `before`: near in units of how far each tensor moved.

    Relative to the weights a step of 1e-4 is all rounding. Looser than a sum, since AdamW divides a gradient
    by its own size and gives the rounding of one near 0 the length of a whole step: set adam_eps above it.
    The critic's cannot be set, so its weights (`critic.*`) may differ by a tenth of what they moved.
    """
    assert actual.keys() == expected.keys() <= before.keys()
    assert any(not torch.equal(weight, before[name]) for name, weight in expected.items()), "nothing moved"
    for name, weight in expected.items():
        relative = 0.1 if name.startswith("critic.") else 1e-3
        moved = float((weight.double() - before[name].double()).norm())
        stored = torch.finfo(torch.float32).eps * float(weight.double().norm())
        apart = float((actual[name].double() - weight.double()).norm())
        assert apart <= relative * moved + stored, f"{name}: {apart:.2e} apart, moved by {moved:.2e}"


@pytest.fixture
def assert_near() -> Callable[[Tensor, Tensor], None]:
    """assert_near(actual, expected): within the tolerance of actual's dtype of a float64 value."""

    def check(actual: Tensor, expected: Tensor) -> None:
        tolerance = TOLERANCES[actual.dtype]
        torch.testing.assert_close(
            actual.double(), expected.double(), rtol=tolerance.relative, atol=tolerance.absolute
        )

    return check


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
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
    return ["triton"] if IS_INTERPRETED else ["reference", "cpu"]


@pytest.fixture(params=_backends())
def backend_name(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test's ops on every backend of this process."""
    with ops.backend(request.param):
        yield request.param


@pytest.fixture(autouse=True, scope="session")
def no_waits_for_the_disk() -> Iterator[None]:
    """A save of a test need not outlive a power cut: some milliseconds for each of its files."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(directories, "_sync", lambda path: None)
        yield


@pytest.fixture
def cuda() -> Iterator[WaitLog]:
    """A CUDA device that is pretended; gives the log of the host's waits for it."""
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device, so none is pretended")
    # What the other tests need not import.
    from pretended_cuda import pretended_cuda

    with pretended_cuda() as waits:
        yield waits


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """torch fills what it would leave uninitialised with NaN, so that an element nobody wrote is seen."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
