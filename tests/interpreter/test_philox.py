"""Counter-based noise in Triton against the published words, numpy and the reference."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from lacfast.kernels.philox import box_muller, normal_noise, philox_words
from torch import Tensor

from lacfast import reference
from lacfast.ops.noise import NormalNoise, NormalNoiseOutputs
from lacfast.records import INITIAL_STEP, NoiseKey

pytestmark = pytest.mark.interpreter

WORD = 0xFFFFFFFF


def _fill(steps: Tensor, seed: Tensor, sample_ids: Tensor, out: Tensor) -> None:
    normal_noise(NormalNoise(steps, seed, sample_ids, list(out.shape)), NormalNoiseOutputs(out))


@triton.jit
def words_kernel(seed_ptr, sample_id_ptr, step_ptr, out_ptr, NUM_QUADS: tl.constexpr):  # noqa: N803
    offs_q = tl.arange(0, NUM_QUADS)
    words = philox_words(tl.load(seed_ptr), tl.load(sample_id_ptr), tl.load(step_ptr), offs_q)
    for i_word in tl.static_range(4):
        tl.store(out_ptr + offs_q * 4 + i_word, words[i_word].to(tl.int64))


def triton_words(seed: int, sample_id: int, step: int, num_quads: int) -> Tensor:
    out = torch.full((num_quads, 4), -1)
    inputs = [torch.tensor([number]) for number in (seed, sample_id, step)]
    words_kernel[(1,)](*inputs, out, NUM_QUADS=num_quads)
    return out


def numpy_words(seed: int, sample_id: int, step: int, num_quads: int) -> Tensor:
    """Philox4x32-10 in 64-bit integers."""
    c0 = np.arange(num_quads, dtype=np.uint64)
    c1, c2, c3 = (
        np.full(num_quads, number & WORD, dtype=np.uint64) for number in (step, sample_id, sample_id >> 32)
    )
    k0, k1 = seed & WORD, (seed >> 32) & WORD
    word, shift = np.uint64(WORD), np.uint64(32)
    for _ in range(10):
        product_0, product_2 = np.uint64(0xD2511F53) * c0, np.uint64(0xCD9E8D57) * c2
        c0, c2 = (
            (product_2 >> shift) ^ c1 ^ np.uint64(k0),
            (product_0 >> shift) ^ c3 ^ np.uint64(k1),
        )
        c1, c3 = product_2 & word, product_0 & word
        k0, k1 = (k0 + 0x9E3779B9) & WORD, (k1 + 0xBB67AE85) & WORD
    return torch.from_numpy(np.stack([c0, c1, c2, c3], axis=1).astype(np.int64))


def test_words_are_the_published_ones() -> None:
    published = [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert triton_words(0, 0, 0, num_quads=1).tolist() == [published]


@pytest.mark.parametrize(
    ("seed", "sample_id", "step"),
    [(1, 2, 3), (-1, -1, -1), (-(2**40) - 12345, 2**40 + 3, INITIAL_STEP), (2**63 - 1, 2**32, 49)],
)
def test_words_are_bit_identical_to_numpy_and_the_reference(seed: int, sample_id: int, step: int) -> None:
    words = triton_words(seed, sample_id, step, num_quads=64)
    assert torch.equal(words, numpy_words(seed, sample_id, step, num_quads=64))
    tail = torch.tensor([step & WORD, sample_id & WORD, (sample_id >> 32) & WORD]).expand(64, 3)
    counter = torch.cat([torch.arange(64)[:, None], tail], dim=1)
    assert torch.equal(words, reference.philox(counter, torch.tensor([seed & WORD, (seed >> 32) & WORD])))


@pytest.mark.parametrize("num_elements", [1, 6, 512, 1000, 5001])
def test_normals_equal_the_reference(
    num_elements: int, key: tuple[Tensor, Tensor], poisoned: Callable[..., Tensor]
) -> None:
    seed, sample_ids = key
    steps = torch.tensor([INITIAL_STEP, 0, 7, 3])
    out = poisoned(4, num_elements)
    _fill(steps, seed, sample_ids, out)
    expected = reference.normal_noise((4, num_elements), steps, NoiseKey(seed, sample_ids))
    # Logarithm, sine and cosine of two libraries in float32; the contract between backends is 1e-4.
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-5)


@triton.jit
def box_muller_kernel(radius_ptr, angle_ptr, out_ptr, N: tl.constexpr):
    offs = tl.arange(0, N)
    words = tl.load(radius_ptr + offs).to(tl.uint32), tl.load(angle_ptr + offs).to(tl.uint32)
    cosine, sine = box_muller(*words)
    tl.store(out_ptr + offs, cosine)
    tl.store(out_ptr + N + offs, sine)


def test_two_words_become_normals_as_in_float64() -> None:
    generator = np.random.default_rng(0)
    # Every quarter's borders, the smallest and the largest radius, and numbers between.
    edges = np.array([0, 0xFF, 0x100, 0x1FFFFFFF, 0x20000000, 0x5FFFFF00, 0x60000000, WORD - 0xFF, WORD])
    grid = np.stack(np.meshgrid(edges, edges), axis=-1).reshape(-1, 2)
    words = np.concatenate([grid, generator.integers(0, WORD, (4096 - len(grid), 2), endpoint=True)])
    out = torch.full((2, 4096), torch.nan)
    box_muller_kernel[(1,)](*torch.from_numpy(words.astype(np.int64)).mT.contiguous(), out, N=4096)
    # The definition rounds u to float32: the last of the largest ones is 1.
    radius, angle = ((words >> 8) * 2.0**-24 + 2.0**-25).astype(np.float32).astype(np.float64).T
    expected = np.sqrt(-2 * np.log(radius)) * np.stack([np.cos(2 * np.pi * angle), np.sin(2 * np.pi * angle)])
    assert np.abs(out.numpy() - expected).max() < 2e-6


def test_normals_do_not_depend_on_the_batch(
    key: tuple[Tensor, Tensor], poisoned: Callable[..., Tensor]
) -> None:
    seed, sample_ids = key
    steps = torch.tensor([0, 5, 2, 1])
    whole, part = poisoned(4, 2500), poisoned(2, 2500)
    _fill(steps, seed, sample_ids, whole)
    rows = torch.tensor([3, 1])
    _fill(steps[rows], seed, sample_ids[rows], part)
    assert torch.equal(part, whole[rows])


def test_normals_are_standard_and_uncorrelated(poisoned: Callable[..., Tensor]) -> None:
    out = poisoned(4, 8192)
    _fill(torch.zeros(4, dtype=torch.int64), torch.tensor([42]), torch.arange(4), out)
    # Standard errors at 32768 numbers: 0.0055 of the mean, 0.0078 of the variance, 0.011 of a correlation.
    assert abs(out.mean()) < 0.02
    assert abs(out.var() - 1) < 0.03
    assert (out.corrcoef() - torch.eye(4)).abs().max() < 0.045
    assert abs((out[:, 0::2] * out[:, 1::2]).mean()) < 0.03
