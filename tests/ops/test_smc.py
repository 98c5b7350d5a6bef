"""Particles: how many count, which survive, and that every backend chooses the same."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from lacfast import ops, reference
from lacfast.records import NoiseKey

INFINITE = math.inf


def draw(groups: int, particles: int, seed: int = 0, spread: float = 3.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return spread * torch.randn(groups, particles, generator=generator, dtype=torch.float64)


def steps_and_key(groups: int, seed: int = 2**40 + 5) -> tuple[Tensor, NoiseKey]:
    return torch.arange(groups), NoiseKey.create(seed, torch.arange(groups) + 2**33)


def counts(ancestors: Tensor) -> Tensor:
    """(G, N) children of every particle."""
    return torch.zeros_like(ancestors).scatter_add_(1, ancestors, torch.ones_like(ancestors))


@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (2, 256), (2, 4096)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_size_is_the_squared_sum_over_the_sum_of_squares(shape, dtype, backend_name, assert_near):
    log_weights = draw(*shape).to(dtype)
    weights = log_weights.double().exp()
    expected = weights.sum(dim=1) ** 2 / (weights**2).sum(dim=1)
    size = ops.effective_sample_size(log_weights)
    assert size.dtype == dtype
    assert_near(size, expected)


def test_size_is_between_one_and_all_for_weights_of_any_scale(backend_name):
    log_weights = torch.tensor([[0.0, 0, 0, 0], [5, -900, -900, -900], [1e4, 1e4, -1e4, -INFINITE]])
    torch.testing.assert_close(ops.effective_sample_size(log_weights), torch.tensor([4.0, 1.0, 2.0]))
    torch.testing.assert_close(ops.effective_sample_size(log_weights - 8192), torch.tensor([4.0, 1.0, 2.0]))


def test_a_group_without_weight_has_size_zero_and_keeps_its_particles(backend_name):
    log_weights = torch.tensor([[-INFINITE] * 5, [math.nan] * 5])
    assert torch.equal(ops.effective_sample_size(log_weights), torch.zeros(2))
    ancestors = ops.systematic_resample(log_weights, *steps_and_key(2))
    assert torch.equal(ancestors, torch.arange(5).expand(2, 5))


@pytest.mark.parametrize("particles", [1, 2, 5, 64, 1000, 4096])
def test_equal_weights_keep_every_particle_in_its_place(particles, backend_name):
    ancestors = ops.systematic_resample(torch.full((3, particles), -7.25), *steps_and_key(3))
    assert torch.equal(ancestors, torch.arange(particles).expand(3, particles))


def test_a_weight_of_zero_is_never_chosen_and_an_infinite_one_always(backend_name):
    log_weights = torch.tensor([[-INFINITE, 1.0, math.nan, 0.0, -INFINITE], [0.0, INFINITE, 3.0, 1.0, 0.0]])
    for seed in range(20):
        ancestors = ops.systematic_resample(log_weights, *steps_and_key(2, seed))
        assert set(ancestors[0].tolist()) <= {1, 3}
        assert ancestors[1].tolist() == [1] * 5


@settings(max_examples=60, deadline=None)
@given(
    log_weights=st.lists(st.floats(-60, 60) | st.just(-INFINITE), min_size=1, max_size=40),
    seed=st.integers(-(2**63), 2**63 - 1),
)
def test_children_are_the_expected_number_rounded_down_or_up(log_weights, seed):
    given_weights = torch.tensor([log_weights], dtype=torch.float64)
    ancestors = ops.systematic_resample(given_weights, *steps_and_key(1, seed))
    assert torch.equal(ancestors, reference.systematic_resample(given_weights, *steps_and_key(1, seed)))
    assert torch.equal(ancestors, ancestors.sort(dim=1).values)
    if given_weights.max() > -INFINITE:
        expected = len(log_weights) * given_weights.softmax(dim=1)
        # Weights are counted in 2^-36 of the largest: next to an integer a count may lie on its other side.
        assert (counts(ancestors) >= (expected - 1e-6).floor()).all()
        assert (counts(ancestors) <= (expected + 1e-6).ceil()).all()


def test_children_are_the_expected_number_on_average_over_seeds():
    log_weights = draw(1, 9)
    draws = 4000
    # One group per seed stands for many seeds: the group id is part of the counter.
    many = log_weights.expand(draws, 9).contiguous()
    children = counts(ops.systematic_resample(many, *steps_and_key(draws))).double()
    expected = 9 * log_weights.softmax(dim=1)[0]
    # A count's standard deviation is at most 1/2; five standard errors.
    assert (children.mean(dim=0) - expected).abs().max() < 5 * 0.5 / draws**0.5


@pytest.mark.parametrize("shape", [(1, 1), (40, 3), (5, 257), (3, 4096)])
@pytest.mark.parametrize("spread", [0.01, 3.0, 30.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_ancestors_are_those_of_the_reference_bit_for_bit(shape, spread, dtype):
    log_weights = draw(*shape, spread=spread).to(dtype)
    steps, key = steps_and_key(shape[0])
    ours = ops.systematic_resample(log_weights, steps, key)
    assert torch.equal(ours, reference.systematic_resample(log_weights, steps, key))
    assert torch.equal(ours, ops.systematic_resample(log_weights, steps, key))


def test_ancestors_depend_on_seed_step_and_group_but_not_on_the_batch(backend_name):
    log_weights = draw(1, 200).expand(4, 200).contiguous()
    steps, key = torch.tensor([0, 1, 0, 0]), NoiseKey.create(3, torch.tensor([5, 5, 6, 5]))
    together = ops.systematic_resample(log_weights, steps, key)
    assert torch.equal(together[0], together[3])
    assert not torch.equal(together[0], together[1])
    assert not torch.equal(together[0], together[2])
    other_seed = NoiseKey.create(4, key.sample_ids)
    assert not torch.equal(together[0], ops.systematic_resample(log_weights, steps, other_seed)[0])
    rows = torch.tensor([2])
    assert torch.equal(
        ops.systematic_resample(log_weights[rows], steps[rows], key.select(rows)), together[rows]
    )


def test_particle_ops_run_under_fake_tensors_compile_and_pass_opcheck():
    log_weights, (steps, key) = draw(3, 11).requires_grad_(), steps_and_key(3)

    def both(weights: Tensor, at: Tensor, seed: Tensor, ids: Tensor) -> Tensor:
        ancestors = ops.systematic_resample(weights, at, NoiseKey(seed, ids))
        return torch.where((ops.effective_sample_size(weights) < 5.5)[:, None], ancestors, torch.arange(11))

    arguments = (log_weights, steps, key.seed, key.sample_ids)
    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*arguments), both(*arguments))
    with FakeTensorMode() as mode:
        assert both(*(mode.from_tensor(argument) for argument in arguments)).shape == (3, 11)
    assert not ops.effective_sample_size(log_weights).requires_grad
    detached = (log_weights.detach(), *arguments[1:])
    torch.library.opcheck(torch.ops.lacfast.effective_sample_size.default, detached[:1])
    torch.library.opcheck(torch.ops.lacfast.systematic_resample.default, detached)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w, s, k: (w[0], s, k), r"log_weights has shape \(6,\); it must be \(G, N\)"),
        (lambda w, s, k: (torch.zeros(2, 4097), s, k), "N from 1 to 4096"),
        (lambda w, s, k: (w.half(), s, k), "log_weights has dtype torch.float16"),
        (lambda w, s, k: (w[:1].expand(2, 6), s, k), "pass log_weights.contiguous"),
        (lambda w, s, k: (w, s[:1], k), r"steps has shape \(1,\).*must be \(2,\)"),
        (
            lambda w, s, k: (w, s, NoiseKey(k.seed, k.sample_ids.int())),
            "key.sample_ids has dtype torch.int32",
        ),
    ],
)
def test_bad_input_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        ops.systematic_resample(*change(torch.zeros(2, 6), *steps_and_key(2)))
