"""The CUDA C++ kernels as they are written, run on the CPU: grids, tiles, barriers and sums without a GPU.

tests/cuda_emulation compiles csrc/cuda with g++ and runs a block's threads as fibers. What it cannot tell
is what nvcc makes of the code: test_cuda_compile.py, and on a GPU test_gpu.py.
"""

from __future__ import annotations

import importlib
import shutil
from collections.abc import Iterator

import pytest
import torch
from cuda_emulation.emulator import EmulatedModule, build
from tolerances import STORAGE_DTYPES
from torch import Tensor

from lacfast import ops, reference
from lacfast.ops.advantages import (
    AdvantageApply,
    AdvantageApplyOutputs,
    AdvantageSums,
    AdvantageSumsOutputs,
    cuda_blocks,
)
from lacfast.ops.backend import launch
from lacfast.records import NoiseKey, RewardCondition

COMPILER = shutil.which("g++")
pytestmark = pytest.mark.skipif(COMPILER is None, reason="no g++ on PATH to compile the emulation with")
SETTINGS = {"gamma": 0.97, "gae_lambda": 0.9, "value_lambda": 0.8}
# Sizes 1 and odd, more steps than a tile, heads that leave lanes idle, more rows than a block holds.
SHAPES = [(1, 1, 1), (33, 7, 1), (5, 33, 3), (70, 3, 2)]


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> EmulatedModule:
    assert COMPILER is not None
    return build(COMPILER, tmp_path_factory.mktemp("emulated"))


@pytest.fixture
def on_emulated_cuda(emulated: EmulatedModule, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The ops take CPU tensors to the emulated kernels."""
    # By their full names: `lacfast.ops.backend` is the function of that module.
    backend, advantages = (
        importlib.import_module(f"lacfast.ops.{name}") for name in ("backend", "advantages")
    )
    monkeypatch.setattr(backend, "choose", lambda *_: "cuda")
    monkeypatch.setattr(backend, "native_kernel", emulated.kernel)
    monkeypatch.setattr(backend, "current_stream", lambda: 0)
    monkeypatch.setattr(advantages, "_parts", advantages.cuda_blocks)
    backend._kernel.cache_clear()
    # Results that nobody wrote are NaN.
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
    backend._kernel.cache_clear()


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("dtype", STORAGE_DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_gae_and_its_gradient_equal_the_float64_reference(shape, dtype, assert_near, on_emulated_cuda):
    inputs = [draw(*shape, seed=seed).to(dtype).requires_grad_() for seed in (1, 2)]
    doubles = [tensor.detach().double().requires_grad_() for tensor in inputs]
    grads = [draw(*shape, seed=seed).to(dtype) for seed in (3, 4)]
    ours, exact = ops.gae(*inputs, **SETTINGS), reference.gae(*doubles, **SETTINGS)
    own_gradients = torch.autograd.grad(ours, inputs, grads)
    gradients = torch.autograd.grad(exact, doubles, [grad.double() for grad in grads])
    for one, other in zip((*ours, *own_gradients), (*exact, *gradients), strict=True):
        assert_near(one, other)


@pytest.mark.parametrize("dtype", STORAGE_DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_advantage_pipeline_equals_the_float64_reference(shape, dtype, assert_near, on_emulated_cuda):
    batch, _, heads = shape
    maths = torch.float64 if dtype == torch.float64 else torch.float32
    rewards, mean, std = (draw(*size).to(maths) for size in ((batch, heads), (heads,), (heads,)))
    inputs = (rewards, draw(*shape).to(dtype), mean, std.abs() + 0.3, (std**2 + 0.1))
    mask = draw(batch, seed=5) > -1
    ours = ops.normalized_advantages(*inputs, mask=mask, **SETTINGS)
    exact = reference.normalized_advantages(*(each.double() for each in inputs), mask=mask, **SETTINGS)
    for name in ("advantages", "raw", "targets"):
        assert_near(getattr(ours, name), getattr(exact, name))


@pytest.mark.parametrize("shape", [(3, 1, 16), (16500, 1, 1)], ids=["most rewards", "largest grid"])
def test_the_limits_of_rewards_and_of_the_grid_are_reached(shape, assert_near, on_emulated_cuda):
    batch, _, heads = shape
    inputs = [
        each.float() for each in (draw(batch, heads), draw(*shape), draw(heads), draw(heads).abs() + 0.3)
    ]
    ours = ops.normalized_advantages(*inputs, torch.ones(heads))
    exact = reference.normalized_advantages(*(each.double() for each in inputs), torch.ones(heads).double())
    for name in ("advantages", "raw", "targets"):
        assert_near(getattr(ours, name), getattr(exact, name))


@pytest.mark.parametrize("combination", ["sum", "scalarized"])
@pytest.mark.parametrize("per_step", [False, True])
def test_the_other_rules_equal_the_float64_reference(combination, per_step, assert_near, on_emulated_cuda):
    rewards = draw(9, 5, 3) if per_step else draw(9, 3)
    values = draw(9, 5, 1 if combination == "scalarized" else 3)
    inputs = [each.float() for each in (rewards, values, draw(3), draw(3).abs() + 0.3, draw(3))]
    condition = RewardCondition(reward=2, on=0, threshold=0.1)
    settings = {"combination": combination, "conditions": () if per_step else (condition,), **SETTINGS}
    ours = ops.normalized_advantages(*inputs, **settings)
    exact = reference.normalized_advantages(*(each.double() for each in inputs), **settings)
    for name in ("advantages", "raw", "targets"):
        assert_near(getattr(ours, name), getattr(exact, name))


def test_two_halves_with_a_reduction_between_give_the_whole(on_emulated_cuda):
    inputs = [each.float() for each in (draw(300, 2), draw(300, 3, 2), draw(2), draw(2).abs() + 0.3, draw(2))]
    whole = ops.normalized_advantages(*inputs)
    seen: list[Tensor] = []
    halves = ops.normalized_advantages(*inputs, all_reduce=seen.append)
    torch.testing.assert_close(halves.advantages, whole.advantages)
    assert seen[0][0] == 900


@pytest.mark.parametrize("shape", [(1, 1), (5, 3), (3, 257), (2, 4096)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_particles_are_counted_and_chosen_as_on_the_cpu(shape, dtype, assert_near, on_emulated_cuda):
    log_weights = (5 * draw(*shape)).to(dtype)
    log_weights[0, ::2] = -torch.inf
    steps, key = torch.arange(shape[0]), NoiseKey.create(2**50 + 1, range(2**33, 2**33 + shape[0]))
    ancestors = ops.systematic_resample(log_weights, steps, key)
    assert torch.equal(ancestors, reference.systematic_resample(log_weights, steps, key))
    assert_near(ops.effective_sample_size(log_weights), reference.effective_sample_size(log_weights.double()))


@pytest.mark.parametrize(
    ("rows", "heads", "blocks"), [(1, 1, 1), (64, 1, 1), (65, 1, 2), (4, 16, 1), (5, 16, 2), (2**40, 16, 256)]
)
def test_grids_are_those_of_the_shape_alone(rows, heads, blocks):
    assert cuda_blocks(torch.empty(rows, 1, heads, device="meta")) == blocks


def test_no_kernel_writes_outside_its_outputs(on_emulated_cuda):
    """Outputs between margins of NaN, at sizes that fill no warp, tile or block."""
    shape, margin = (37, 35, 3), 128
    size = torch.Size(shape).numel()
    sizes = (size, size, 4 * 13, 37 * 35)
    buffers = [torch.full((written + 2 * margin,), torch.nan, dtype=torch.float64) for written in sizes]
    buffers = [buffer.float() if i != 2 else buffer for i, buffer in enumerate(buffers)]
    views = [buffer[margin : margin + written] for buffer, written in zip(buffers, sizes, strict=True)]
    statistics = (torch.zeros(3), torch.ones(3), torch.ones(3))
    inputs = (draw(37, 3).float(), draw(*shape).float(), *statistics, None, False, [-1] * 3, [0.0] * 3)
    sums = AdvantageSumsOutputs(views[0].view(shape), views[1].view(shape), views[2].view(4, 13))
    launch("cuda", "advantage_sums", inputs[0], AdvantageSums(*inputs, 1.0, 0.9, 1.0, 5.0), sums)
    apply = AdvantageApply(sums.raw, statistics[2], None, sums.sums, False, True, 10.0)
    launch("cuda", "advantage_apply", inputs[0], apply, AdvantageApplyOutputs(views[3].view(37, 35)))
    for buffer, written in zip(buffers, sizes, strict=True):
        assert buffer[:margin].isnan().all()
        assert buffer[margin + written :].isnan().all()
        assert not buffer[margin : margin + written].isnan().any()
