"""gae: the recursion, its adjoint, and what follows from telescoping."""

from __future__ import annotations

import pytest
import torch
from tolerances import STORAGE_DTYPES
from torch._subclasses.fake_tensor import FakeTensorMode

from lacfast import ops, reference

SETTINGS = {"gamma": 0.97, "gae_lambda": 0.9, "value_lambda": 0.8}
# Sizes 1, odd (chains left over from a vector, more steps than a tile), several heads, and one real.
SHAPES = [(1, 1, 1), (11, 7, 1), (3, 5, 3), (2, 131, 2), (9, 65, 1), (128, 20, 2)]


def _pair(shape, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))


@pytest.mark.parametrize("dtype", STORAGE_DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_forward_equals_the_reference(shape, dtype, assert_near, poisoned_memory):
    rewards, values = _pair(shape, dtype)
    advantages, returns = ops.gae(rewards, values, **SETTINGS)
    expected = reference.gae(rewards.double(), values.double(), **SETTINGS)
    assert advantages.dtype == returns.dtype == dtype
    assert_near(advantages, expected[0])
    assert_near(returns, expected[1])


@pytest.mark.parametrize("value_lambda", [SETTINGS["gae_lambda"], 0.8])
@pytest.mark.parametrize("steps", [*range(1, 11), 15, 16, 28, 33, 50])
def test_a_chain_of_any_length_equals_the_reference(steps, value_lambda, assert_near, poisoned_memory):
    settings = SETTINGS | {"value_lambda": value_lambda}
    for dtype in (torch.float32, torch.float64):
        rewards, values = _pair((19, steps, 1), dtype)
        results = ops.gae(rewards, values, **settings)
        expected = reference.gae(rewards.double(), values.double(), **settings)
        for one, other in zip(results, expected, strict=True):
            assert_near(one, other)


@pytest.mark.parametrize("dtype", STORAGE_DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_backward_equals_the_reference(shape, dtype, assert_near, poisoned_memory):
    inputs = [tensor.requires_grad_() for tensor in _pair(shape, dtype)]
    doubles = [tensor.detach().double().requires_grad_() for tensor in inputs]
    grads = _pair(shape, dtype, seed=1)
    actual = torch.autograd.grad(ops.gae(*inputs, **SETTINGS), inputs, grads)
    expected = torch.autograd.grad(
        reference.gae(*doubles, **SETTINGS), doubles, [grad.double() for grad in grads]
    )
    for one, other in zip(actual, expected, strict=True):
        assert_near(one, other)


def test_gradients_pass_gradcheck():
    inputs = [tensor.requires_grad_() for tensor in _pair((3, 6, 2), torch.float64)]
    assert torch.autograd.gradcheck(lambda rewards, values: ops.gae(rewards, values, **SETTINGS), inputs)


def test_a_non_contiguous_incoming_gradient_is_read_right():
    rewards, values = (tensor.requires_grad_() for tensor in _pair((4, 6, 2), torch.float32))
    outputs = ops.gae(rewards, values, **SETTINGS)
    strided = [torch.randn(6, 4, 2).transpose(0, 1), torch.randn(4, 1, 1).expand(4, 6, 2)]
    from_views = torch.autograd.grad(outputs, (rewards, values), strided, retain_graph=True)
    from_copies = torch.autograd.grad(outputs, (rewards, values), [grad.contiguous() for grad in strided])
    for one, other in zip(from_views, from_copies, strict=True):
        assert torch.equal(one, other)


def test_lambda_one_gives_return_minus_value():
    rewards, values = _pair((5, 70, 2), torch.float64)
    advantages, returns = ops.gae(rewards, values)
    to_go = rewards.flip(1).cumsum(1).flip(1)
    torch.testing.assert_close(advantages, to_go - values)
    torch.testing.assert_close(returns, to_go)


@pytest.mark.parametrize("dtype", STORAGE_DTYPES, ids=str)
@pytest.mark.parametrize("heads", [1, 2])
def test_one_lambda_for_both_gives_the_same_as_two(dtype, heads, assert_near, poisoned_memory):
    rewards, values = _pair((11, 67, heads), dtype)
    shared = {"gamma": 0.97, "gae_lambda": 0.8, "value_lambda": 0.8}
    expected = reference.gae(rewards.double(), values.double(), **shared)
    for actual, wanted in zip(ops.gae(rewards, values, **shared), expected, strict=True):
        assert_near(actual, wanted)


def test_a_perfect_critic_leaves_no_advantage():
    rewards, _ = _pair((5, 9, 2), torch.float64)
    to_go = rewards.flip(1).cumsum(1).flip(1)
    advantages, _ = ops.gae(rewards, to_go, gae_lambda=0.3)
    assert advantages.abs().max() < 1e-12


@pytest.mark.parametrize("steps", [1, 2, 3, 5, 8, 33])
def test_what_is_not_finite_stays_in_its_chain(steps):
    rewards, values = _pair((19, steps, 1), torch.float32)
    wanted = ops.gae(rewards, values, **SETTINGS)
    rewards[6], values[7] = torch.nan, torch.inf
    others = [row for row in range(19) if row not in (6, 7)]
    for one, other in zip(ops.gae(rewards, values, **SETTINGS), wanted, strict=True):
        assert torch.equal(one[others], other[others])
        assert not one[6:8].isfinite().any()


@pytest.mark.parametrize(("steps", "heads"), [(3, 1), (5, 1), (8, 1), (33, 1), (33, 3)])
def test_a_chain_does_not_depend_on_its_batch(steps, heads):
    rewards, values = _pair((13, steps, heads), torch.float32)
    together = ops.gae(rewards, values, **SETTINGS)
    alone = ops.gae(rewards[6:7].contiguous(), values[6:7].contiguous(), **SETTINGS)
    for one, all_of_them in zip(alone, together, strict=True):
        assert torch.equal(one, all_of_them[6:7])


def test_gae_runs_under_fake_tensors_compiles_and_passes_opcheck():
    rewards, values = (tensor.requires_grad_() for tensor in _pair((3, 5, 2), torch.float32))
    eager = ops.gae(rewards, values, **SETTINGS)
    compiled = torch.compile(lambda r, v: ops.gae(r, v, **SETTINGS), fullgraph=True, backend="aot_eager")
    for one, other in zip(compiled(rewards, values), eager, strict=True):
        assert torch.equal(one, other)
    (gradient,) = torch.autograd.grad(compiled(rewards, values)[0].sum(), values)
    assert torch.equal(gradient, torch.autograd.grad(eager[0].sum(), values)[0])
    with FakeTensorMode() as mode:
        fake = ops.gae(mode.from_tensor(rewards), mode.from_tensor(values), **SETTINGS)
        assert fake[0].shape == (3, 5, 2)
    torch.library.opcheck(torch.ops.lacfast.gae.default, (rewards, values, 0.9, 0.8, 1.0))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r, v: (r[..., 0], v), r"rewards has shape \(4, 3\); it must be \(B, T, M\)"),
        (lambda r, v: (r, v[:, :2]), r"values has shape \(4, 2, 2\).*must be \(4, 3, 2\)"),
        (lambda r, v: (r, v.double()), "values has dtype torch.float64.*must be torch.float32"),
        (lambda r, v: (r.int(), v), "rewards has dtype torch.int32"),
        (lambda r, v: (r, v.to("meta")), "values is on meta but rewards on cpu; move it"),
        (lambda r, v: (r, torch.empty(3, 4, 2).transpose(0, 1)), r"values .*pass values.contiguous\(\)"),
    ],
)
def test_bad_input_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        ops.gae(*change(torch.zeros(4, 3, 2), torch.zeros(4, 3, 2)))
