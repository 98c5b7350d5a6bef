"""Launches of compiled kernels: the kernel that Triton would have taken, with the same arguments."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton is not installed")

import triton.language as tl  # noqa: E402
from recorded_launches import LaunchRecorder  # noqa: E402
from triton.compiler import CompiledKernel  # noqa: E402
from triton.runtime.driver import driver  # noqa: E402

from lacfast.kernels import compiled  # noqa: E402


@triton.jit
def scaled(x_ptr, y_ptr, factor, N, BLOCK: tl.constexpr, HAS_Y: tl.constexpr):  # noqa: N803
    offs = tl.arange(0, BLOCK)
    b_x = tl.load(x_ptr + offs, mask=offs < N)
    b_y = tl.load(y_ptr + offs) if HAS_Y else b_x
    tl.store(x_ptr + offs, b_x * factor + b_y, mask=offs < N)


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Iterator[LaunchRecorder]:
    monkeypatch.setattr(compiled, "_compiled", {})
    monkeypatch.setattr(compiled, "_unknown", set())
    scaled.device_caches.clear()
    recorder = LaunchRecorder()
    monkeypatch.setattr(driver, "_active", recorder)
    yield recorder
    scaled.device_caches.clear()


X, Y = torch.zeros(64), torch.zeros(64)
ARGUMENTS: list[tuple[Any, ...]] = [
    (X, Y, 0.5, 32),
    # Of the same kernel, for another factor and another multiple of 16.
    (X, Y, 0.25, 48),
    (X, Y, 0.5, 1),
    (X, Y, 0.5, 33),
    (X, Y, 0.5, 2**31),
    (X[1:], Y, 0.5, 32),
    (X.double(), Y, 0.5, 32),
    (X, None, 0.5, 32),
]


def test_every_launch_is_of_the_kernel_and_with_the_arguments_that_triton_takes(
    recorder: LaunchRecorder,
) -> None:
    def launched(launch: Any, arguments: tuple[Any, ...]) -> list[Any]:
        launch(*arguments, BLOCK=64, HAS_Y=arguments[1] is not None, num_warps=1, enable_fp_fusion=False)
        made = recorder.launches.pop()
        # Without what hooks are told; tensors by what they are, since they have no truth value to compare.
        return [id(part) if isinstance(part, torch.Tensor) else part for part in made[:6] + made[7:]]

    by_triton = [launched(scaled[(3,)], arguments) for arguments in ARGUMENTS]
    # The fourth is the function that the driver loaded.
    assert len({id(launch[4]) for launch in by_triton}) == len(ARGUMENTS) - 1
    for _ in range(2):
        assert [launched(partial(compiled.run, scaled, (3,)), each) for each in ARGUMENTS] == by_triton
    assert len(compiled._compiled) == len(ARGUMENTS) - 1


def test_a_second_launch_does_not_go_through_triton(
    recorder: LaunchRecorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"BLOCK": 64, "HAS_Y": True, "num_warps": 1, "enable_fp_fusion": False}
    compiled.run(scaled, (1,), X, Y, 0.5, 32, **options)
    monkeypatch.setattr(type(scaled), "run", lambda *_, **__: pytest.fail("bound by Triton again"))
    compiled.run(scaled, (2, 5), X, Y, 0.75, 48, **options)
    assert [launch[:3] for launch in recorder.launches] == [(1, 1, 1), (2, 5, 1)]
    assert recorder.launches[1][-4:] == (0.75, 48, 64, True)


def _other_arguments(self: Any, grid: tuple[int, ...]) -> Any:
    def runner(grid: tuple[int, ...], arguments: dict[str, Any]) -> None:
        pytest.fail("called with another form of arguments")

    return runner


def _not_callable(self: Any, grid: tuple[int, ...]) -> Any:
    raise NotImplementedError("launch a kernel with kernel.launch(grid, ...)")


@pytest.mark.parametrize("changed", [_other_arguments, _not_callable])
def test_a_triton_that_launches_otherwise_launches_itself(
    recorder: LaunchRecorder, monkeypatch: pytest.MonkeyPatch, changed: Any
) -> None:
    options = {"BLOCK": 64, "HAS_Y": True, "num_warps": 1, "enable_fp_fusion": False}
    compiled.run(scaled, (1,), X, Y, 0.5, 32, **options)
    monkeypatch.setattr(CompiledKernel, "__getitem__", changed)
    with pytest.warns(RuntimeWarning, match="takes Triton's own way"):
        compiled.run(scaled, (2, 5), X, Y, 0.75, 48, **options)
    # Said once.
    compiled.run(scaled, (3,), X, Y, 0.25, 48, **options)
    assert [launch[:3] for launch in recorder.launches] == [(1, 1, 1), (2, 5, 1), (3, 1, 1)]
    assert [launch[-4:] for launch in recorder.launches[1:]] == [(0.75, 48, 64, True), (0.25, 48, 64, True)]
    assert not compiled._compiled


def test_a_kernel_that_does_not_tell_its_arguments_is_launched_by_triton(
    recorder: LaunchRecorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"BLOCK": 64, "HAS_Y": True, "num_warps": 1, "enable_fp_fusion": False}
    compiled.run(scaled, (1,), X, Y, 0.5, 32, **options)
    compiled._compiled.clear()

    class Silent(triton.JITFunction):
        """arg_names is renamed."""

        arg_names = property(lambda _: {}["arg_names"])

        def __init__(self) -> None:
            pass

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            return scaled[grid]

    with pytest.warns(RuntimeWarning, match="launches kernels otherwise"):
        compiled.run(Silent(), (4,), X, Y, 0.5, 32, **options)
    assert recorder.launches[-1][:3] == (4, 1, 1)


def test_an_error_of_the_device_is_not_taken_for_another_triton(
    recorder: LaunchRecorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: Any, grid: tuple[int, ...]) -> Any:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    options = {"BLOCK": 64, "HAS_Y": True, "num_warps": 1, "enable_fp_fusion": False}
    compiled.run(scaled, (1,), X, Y, 0.5, 32, **options)
    monkeypatch.setattr(CompiledKernel, "__getitem__", broken)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        compiled.run(scaled, (1,), X, Y, 0.5, 32, **options)
