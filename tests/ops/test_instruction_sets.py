"""Every instruction set of this build that the processor has: the same results up to the order of sums."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tolerances import TOLERANCES
from torch import Tensor

from lacfast import _C, ops, reference, schedule
from lacfast.records import NoiseKey

ROOT = Path(__file__).parents[2]
CROSS_COMPILER = shutil.which("aarch64-linux-gnu-g++")
# Parts of a group of counters, of a block, and of a run.
SIZES = [(1,), (35,), (1027,), (4, 33, 31)]
DTYPES = list(TOLERANCES)


@pytest.fixture(params=_C.instruction_sets())
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    before = _C.instruction_set()
    _C.use_instruction_set(request.param)
    yield request.param
    _C.use_instruction_set(before)


def assert_near(actual: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
    """Within the dtype's tolerance of what float64 gives, relative to the largest entry."""
    tolerance = TOLERANCES[dtype]
    error = (actual.double() - exact).abs().max()
    assert error <= tolerance.relative * exact.abs().max() + tolerance.absolute


def transition(size: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor, NoiseKey]:
    """sample, model_output, coefficients, steps, key"""
    generator = torch.Generator().manual_seed(0)
    sample, output = (torch.randn(3, *size, generator=generator).to(dtype) for _ in range(2))
    table = schedule.flow_sde(torch.linspace(0.8, 0.2, 4, dtype=torch.float64), 0.7).coefficients()
    arithmetic = table.double() if dtype == torch.float64 else table.float()
    key = NoiseKey.create(2**40 + 3, torch.tensor([7, 2**33, 0]))
    return sample, output, arithmetic, torch.tensor([2, 0, 1]), key


def exact_normals(shape: tuple[int, ...], steps: Tensor, key: NoiseKey) -> Tensor:
    """Box-Muller in float64 on the float32 uniforms of the radius and the exact ones of the angle."""
    elements = torch.Size(shape[1:]).numel()
    quads = (elements + 3) // 4
    counters = torch.zeros(shape[0], quads, 4, dtype=torch.int64)
    counters[..., 0] = torch.arange(quads)
    counters[..., 1] = steps[:, None]
    counters[..., 2] = (key.sample_ids & 0xFFFFFFFF)[:, None]
    counters[..., 3] = (key.sample_ids >> 32 & 0xFFFFFFFF)[:, None]
    seed = torch.cat([key.seed & 0xFFFFFFFF, key.seed >> 32 & 0xFFFFFFFF])
    bits = reference.philox(counters, seed) >> 8
    radius = (-2 * (bits[..., 0::2].float() * 2**-24 + 2**-25).double().log()).sqrt()
    angle = 2 * torch.pi * (bits[..., 1::2].double() * 2**-24 + 2**-25)
    normals = torch.stack([radius * angle.cos(), radius * angle.sin()], dim=-1)
    return normals.reshape(shape[0], -1)[:, :elements].reshape(shape)


@pytest.mark.parametrize("size", [*SIZES, (16, 64, 64)])
def test_normals_are_those_of_float64(instruction_set: str, size: tuple[int, ...], poisoned_memory) -> None:
    *_, steps, key = transition(size, torch.float32)
    noise = ops.normal_noise((3, *size), steps, key)
    assert (noise.double() - exact_normals((3, *size), steps, key)).abs().max() < 5e-6
    # The same bits in a smaller latent and in another batch.
    alone = ops.normal_noise((1, *size), steps[1:2], key.select(torch.tensor([1])))
    assert torch.equal(alone[0], noise[1])
    elements = noise[0].numel()
    longer = ops.normal_noise((3, elements + 777), steps, key)
    assert torch.equal(longer[:, :elements], noise.reshape(3, -1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_a_step_draws_the_noise_that_it_could_be_given(
    instruction_set: str, size: tuple[int, ...], dtype: torch.dtype, poisoned_memory
) -> None:
    sample, output, coefficients, steps, key = transition(size, dtype)
    noise = ops.normal_noise(tuple(sample.shape), steps, key)
    drawn = ops.gaussian_step(sample, output, coefficients, steps, noise=key)
    given = ops.gaussian_step(sample, output, coefficients, steps, noise=noise.to(coefficients.dtype))
    assert torch.equal(drawn.prev_sample, given.prev_sample)
    assert torch.equal(drawn.log_prob, given.log_prob)
    doubles = (tensor.double() for tensor in (sample, output, coefficients))
    exact = reference.gaussian_step(*doubles, steps, noise=noise.double())
    assert_near(drawn.prev_sample, exact.prev_sample, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_loss_and_gradient_are_those_of_float64(
    instruction_set: str, size: tuple[int, ...], dtype: torch.dtype, poisoned_memory
) -> None:
    old, shift, coefficients, steps, key = transition(size, dtype)
    noise = ops.normal_noise(tuple(old.shape), steps, key)
    output = (old.double() + 1e-2 * shift.double()).to(dtype).requires_grad_()
    advantages = torch.tensor([1.0, -0.5, 2.0], dtype=coefficients.dtype)
    arguments = (coefficients, steps)
    loss, _ = ops.ppo_loss(output, old, advantages, *arguments, noise=key, clip_range=0.5)
    (gradient,) = torch.autograd.grad(loss, output)
    wide = output.detach().double().requires_grad_()
    exact, _ = reference.ppo_loss(
        wide,
        old.double(),
        advantages.double(),
        coefficients.double(),
        steps,
        noise=noise.double(),
        clip_range=0.5,
    )
    assert_near(loss, exact, coefficients.dtype)
    assert_near(gradient, torch.autograd.grad(exact, wide)[0], dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("tokens", "features", "heads"), [(1, 1, 1), (21, 40, 3), (33, 97, 6), (600, 64, 9)])
def test_pooling_and_its_gradients_are_those_of_float64(
    instruction_set: str, tokens: int, features: int, heads: int, dtype: torch.dtype, poisoned_memory
) -> None:
    generator = torch.Generator().manual_seed(1)
    arithmetic = torch.float64 if dtype == torch.float64 else torch.float32
    x = torch.randn(2, tokens, features, generator=generator).to(dtype).requires_grad_()
    query = torch.randn(2, heads, features, generator=generator).to(arithmetic).requires_grad_()
    weight = (1 + 0.1 * torch.randn(features, generator=generator)).to(arithmetic).requires_grad_()
    leaves = (x, query, weight)
    pooled = ops.value_pool(*leaves)
    grad = torch.randn(pooled.shape, generator=generator).to(arithmetic)
    gradients = torch.autograd.grad(pooled, leaves, grad)
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    exact = reference.value_pool(*wide)
    assert_near(pooled, exact, arithmetic)
    for leaf, actual, expected in zip(
        leaves, gradients, torch.autograd.grad(exact, wide, grad.double()), strict=True
    ):
        assert_near(actual, expected, leaf.dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1), (5, 9, 1), (19, 130, 1), (7, 66, 3)])
def test_advantages_are_those_of_float64(
    instruction_set: str, shape: tuple[int, ...], dtype: torch.dtype, poisoned_memory
) -> None:
    generator = torch.Generator().manual_seed(2)
    rewards, values = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    for value_lambda in (0.95, 1.0):
        options = {"gamma": 0.99, "gae_lambda": 0.95, "value_lambda": value_lambda}
        exact = reference.gae(rewards.double(), values.double(), **options)
        for actual, expected in zip(ops.gae(rewards, values, **options), exact, strict=True):
            assert_near(actual, expected, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_storage_types_round_as_torch_does(instruction_set: str, dtype: torch.dtype) -> None:
    """A step of a = b = 0 and std = 1 stores its noise."""
    # Halfway cases, both sides of them, infinities, NaN, the largest numbers and normal numbers of any size.
    values = torch.tensor([1.0, 1.00390625, 1.01171875, 1.0004883, 65519.0, 65520.0, 3.3e38, 1e-3, 0.0])
    values = torch.cat([values, -values, torch.tensor([float("inf"), -float("inf"), float("nan")])])
    values = torch.cat([values, torch.randn(1100, generator=torch.Generator().manual_seed(3)) * 1e3])
    zeros = torch.zeros(1, values.numel(), dtype=dtype)
    table = torch.tensor([[0.0, 0.0, 1.0]])
    step = ops.gaussian_step(zeros, zeros, table, torch.zeros(1, dtype=torch.int64), noise=values[None])
    torch.testing.assert_close(step.prev_sample[0], values.to(dtype), rtol=0, atol=0, equal_nan=True)


def test_an_unknown_instruction_set_is_named_with_those_that_there_are() -> None:
    before = _C.instruction_set()
    with pytest.raises(ValueError, match=f"'avx9'.*use one of .*{_C.instruction_sets()[0]}"):
        _C.use_instruction_set("avx9")
    assert _C.instruction_set() == before


def test_the_environment_chooses_an_instruction_set() -> None:
    oldest = _C.instruction_sets()[0]

    def chosen(name: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", "from lacfast import _C; print(_C.instruction_set())"],
            env={**os.environ, "LACFAST_INSTRUCTION_SET": name},
            capture_output=True,
            text=True,
        )

    assert chosen(oldest).stdout.strip() == oldest
    assert "ValueError: instruction set 'avx9' is not one that" in chosen("avx9").stderr


@pytest.mark.slow
@pytest.mark.skipif(CROSS_COMPILER is None, reason="no aarch64-linux-gnu-g++ on PATH")
def test_kernels_compile_for_another_processor(tmp_path: Path) -> None:
    """With NEON in the place of SSE; less optimised than in a build, in a third of the time."""
    sources = [ROOT / "csrc/cpu/core_base.cpp", ROOT / "csrc/cpu/dispatch.cpp"]
    flags = ["-std=c++17", "-O1", "-fopenmp-simd", "-ffp-contract=fast"]
    flags += ["-Wall", "-Wextra", "-Werror", "-Wno-psabi"]
    for source in sources:
        command = [CROSS_COMPILER, "-c", *flags, source, "-o", tmp_path / "object.o"]
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
