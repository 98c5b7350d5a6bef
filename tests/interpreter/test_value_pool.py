"""Attention pooling in Triton against the reference in float64: splits, groups of heads, gradients."""

from collections.abc import Callable

import pytest
import torch
from lacfast.kernels.value_pool import MAX_SPLITS, pool_launch, value_pool
from lacfast.kernels.value_pool_backward import value_pool_backward
from torch import Tensor

from lacfast import ops, reference
from lacfast.kernels import launch, value_pool_tiles
from lacfast.ops.value_pool import TRITON_MAX_DIM, ValuePool, ValuePoolOutputs

pytestmark = pytest.mark.interpreter

# B, L, Q, D: one program; ragged tile; two groups of heads, split; a group lacks a head; several blocks of D;
# two heads of a program.
SHAPES = [(1, 1, 1, 1), (2, 5, 2, 16), (1, 11, 5, 24), (1, 19, 3, 70), (1, 5, 1, 300), (1, 2, 3, 4100)]
# On tensor cores: warps and chunks, the last of each not full; splits, the last ragged; groups of heads.
TILE_SHAPES = [
    *((1, 5, heads, 72) for heads in range(1, 9)),
    (2, 1, 1, 8),
    (1, 39, 2, 136),
    (1, 18, 4, 1536),
    (1, 17, 2, 3072),
]
EPS = 1e-6


def _relative(actual: Tensor, expected: Tensor) -> float:
    return ((actual.double() - expected).abs().max() / expected.abs().max().clamp(min=0.1)).item()


@pytest.mark.parametrize(
    ("shape", "dtype", "has_weight"),
    [
        *((shape, torch.float32, True) for shape in SHAPES),
        (SHAPES[2], torch.bfloat16, False),
        (SHAPES[3], torch.bfloat16, True),
        *((shape, torch.bfloat16, shape[2] != 3) for shape in TILE_SHAPES),
        (SHAPES[3], torch.float16, True),
    ],
)
def test_pool_and_gradients_equal_the_reference(
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    has_weight: bool,
    draw: Callable[..., Tensor],
    poisoned: Callable[..., Tensor],
    storage_tolerance: dict[torch.dtype, float],
) -> None:
    batch, tokens, heads, dim = shape
    features = draw(batch, tokens, dim, dtype=dtype)
    query = draw(batch, heads, dim) * (2 / dim**0.5)
    weight = 1 + 0.3 * draw(dim) if has_weight else None
    grad = draw(batch, heads, dim)
    out, log_sum_exp = poisoned(batch, heads, dim), poisoned(batch, heads)
    token_stats = poisoned(batch, heads + 1, tokens)
    record = ValuePool(features, query, weight, EPS, is_trained=True)
    outputs = ValuePoolOutputs(out, poisoned(batch, heads, dim), log_sum_exp, token_stats)
    value_pool(record, outputs)
    inputs = [tensor for tensor in (features, query, weight) if tensor is not None]
    grads = [poisoned(*tensor.shape, dtype=tensor.dtype) for tensor in inputs]
    gradients = ValuePool(*grads, *[None] * (3 - len(grads)), EPS, is_trained=True)
    value_pool_backward(record, outputs, ValuePoolOutputs(grad, None, None, None), gradients)
    doubles = [tensor.double().requires_grad_() for tensor in inputs]
    expected = reference.value_pool(*doubles, eps=EPS)
    assert _relative(out, expected) < 2e-6
    for actual, wanted in zip(grads, torch.autograd.grad(expected, doubles, grad.double()), strict=True):
        assert _relative(actual, wanted) < max(5e-6, storage_tolerance[actual.dtype])
    tokens_normed = features.double() * token_stats[:, heads, :, None].double()
    scores = (query * (1 if weight is None else weight)).double() @ tokens_normed.mT
    assert _relative(token_stats[:, :heads], scores) < 5e-6
    assert _relative(log_sum_exp, scores.logsumexp(dim=-1)) < 5e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sample_has_the_same_bits_in_any_batch(draw: Callable[..., Tensor], dtype: torch.dtype) -> None:
    features, query = draw(3, 40, 24, dtype=dtype), draw(3, 2, 24)

    def pooled(rows: slice) -> tuple[Tensor, Tensor]:
        leaf = query[rows].clone().requires_grad_()
        with ops.backend("triton"):
            out = ops.value_pool(features[rows].contiguous(), leaf)
            (grad,) = torch.autograd.grad(out.square().sum(), leaf)
        return out.detach(), grad

    together, alone = pooled(slice(None)), pooled(slice(1, 2))
    assert all(torch.equal(one, all_[1:2]) for one, all_ in zip(alone, together, strict=True))


@pytest.mark.parametrize("trained", ["features", "query", "weight"])
def test_a_gradient_is_the_same_alone_and_beside_the_others(
    draw: Callable[..., Tensor], trained: str
) -> None:
    tensors = {
        "features": draw(2, 20, 40, dtype=torch.bfloat16),
        "query": draw(2, 3, 40),
        "weight": 1 + 0.1 * draw(40),
    }

    def gradient(names: list[str]) -> Tensor:
        leaves = {name: tensor.clone() for name, tensor in tensors.items()}
        for name in names:
            leaves[name].requires_grad_()
        with ops.backend("triton"):
            out = ops.value_pool(*leaves.values())
        return torch.autograd.grad(out.square().sum(), leaves[trained])[0]

    assert torch.equal(gradient([trained]), gradient(list(tensors)))


@pytest.mark.parametrize("tokens", [1, 16, 31, 1024, 4096, 16_384])
def test_the_splits_of_tiles_cover_all_tokens_once_and_fill_a_gpu(tokens: int) -> None:
    found = value_pool_tiles.tile_launch(torch.bfloat16, tokens, 1536, 7, 227 << 10)
    per_split = value_pool_tiles.BLOCK_L * found.tiles
    assert (found.num_splits - 1) * per_split < tokens <= found.num_splits * per_split
    assert found.num_groups == 2
    assert tokens < 4096 or found.num_splits == value_pool_tiles.MAX_SPLITS


@pytest.mark.parametrize(
    ("dtype", "dim", "shared_bytes"),
    [(torch.float16, 64, 227 << 10), (torch.bfloat16, 70, 227 << 10), (torch.bfloat16, 3072, 163 << 10)],
)
def test_tiles_take_only_what_they_hold(dtype: torch.dtype, dim: int, shared_bytes: int) -> None:
    assert value_pool_tiles.tile_launch(dtype, 64, dim, 1, shared_bytes) is None


def test_three_parts_are_the_whole_number() -> None:
    numbers = torch.randn(1000, generator=torch.Generator().manual_seed(0)) * torch.logspace(-20, 20, 1000)
    rest, total = numbers.clone(), torch.zeros(1000, dtype=torch.float64)
    for _ in range(3):
        part = rest.bfloat16().float()
        total += part
        rest -= part
    assert torch.equal(total, numbers.double())


@pytest.mark.parametrize("dim", [64, 1536, 4096, 5120])
@pytest.mark.parametrize("tokens", [1, 31, 1024, 16_384])
def test_the_splits_cover_all_tokens_once_whatever_the_batch(tokens: int, dim: int) -> None:
    options, (splits, groups, tiles) = pool_launch(torch.empty(2, tokens, dim, device="meta"), 16)
    per_split = options["BLOCK_L"] * tiles
    assert (splits - 1) * per_split < tokens <= splits * per_split
    assert splits <= MAX_SPLITS
    assert groups * options["HEADS"] == 16
    assert pool_launch(torch.empty(64, tokens, dim, device="meta"), 16)[1] == (splits, groups, tiles)


def test_every_row_of_the_table_keeps_tokens_in_vectors() -> None:
    for rows in launch.table("value_pool").values():
        for row in rows:
            dim = min(row.elements, TRITON_MAX_DIM)
            assert row.block * dim // (32 * row.num_warps) <= 16


def test_wider_tokens_than_registers_hold_are_refused() -> None:
    with ops.backend("triton"), pytest.raises(ValueError, match=r"9000 features.* takes 8192; leave"):
        ops.value_pool(torch.zeros(1, 2, 9000), torch.zeros(1, 1, 9000))
