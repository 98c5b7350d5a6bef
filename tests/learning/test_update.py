"""Minibatches cover what they should, and balanced steps pull equally."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lacfast import ops
from lacfast.distributed import World
from lacfast.learning.pairs import Pairs, all_pairs, minibatches
from lacfast.learning.step_tables import step_weights
from lacfast.schedule import flow_sde, uniform_sigmas


def drawn(fraction: float, count: int = 3) -> list[tuple[int, int]]:
    pairs = all_pairs(torch.tensor([1, 4, 5]), batch_size=7)
    parts = minibatches(pairs, count, torch.Generator().manual_seed(0), fraction=fraction)
    return [(int(step), int(row)) for part in parts for step, row in zip(part.steps, part.rows, strict=True)]


def test_every_pair_is_in_exactly_one_minibatch() -> None:
    assert sorted(drawn(1.0)) == [(step, row) for step in (1, 4, 5) for row in range(7)]


@pytest.mark.parametrize(("fraction", "expected"), [(0.5, 11), (0.1, 3), (1.0, 21)])
def test_a_fraction_draws_that_many_different_pairs(fraction: float, expected: int) -> None:
    assert len(set(drawn(fraction))) == len(drawn(fraction)) == expected


def test_a_position_points_to_its_step() -> None:
    steps = torch.tensor([1, 4, 5])
    for part in minibatches(all_pairs(steps, 7), 4, torch.Generator().manual_seed(0)):
        assert torch.equal(steps[part.position], part.steps)


@given(batch=st.integers(1, 9), ranks=st.integers(1, 4), count=st.integers(1, 4), seed=st.integers(0, 99))
def test_even_minibatches_have_as_many_pairs_on_every_rank_and_count_each_once(
    batch: int, ranks: int, count: int, seed: int
) -> None:
    steps, ranks = torch.tensor([1, 4, 5]), min(ranks, batch)
    count = min(count, 3 * batch)
    found: list[list[Pairs]] = []
    for rank in range(ranks):
        share = World(rank, ranks).share(batch)
        pairs, generator = all_pairs(steps, share.count), torch.Generator().manual_seed(seed)
        found.append(list(minibatches(pairs, count, generator, share=share, even=True)))
    counted = []
    for parts in zip(*found, strict=True):
        assert len({len(part) for part in parts}) == 1
        assert min(part.masked for part in parts) == 0
        assert {part.total for part in parts} == {sum(part.counted for part in parts)}
        for rank, part in enumerate(parts):
            first, real = World(rank, ranks).share(batch).first, slice(part.counted)
            counted += list(zip(part.steps[real].tolist(), (part.rows[real] + first).tolist(), strict=True))
            split = list(part.split(2))
            assert sum(each.counted for each in split) == part.counted
            masks = [each.padded(2)[1].sum() for each in split]
            assert sum(map(int, masks)) == part.counted
    assert sorted(counted) == [(step, row) for step in steps.tolist() for row in range(batch)]


def test_balanced_steps_pull_equally_on_the_model_s_output() -> None:
    """At v = v_old the gradient is w A eps b / std / N, so balanced weights make its length the same."""
    table = flow_sde(uniform_sigmas(8), 0.7, window=(0, 7))
    weights = step_weights(table, balanced=True)
    assert float(weights[table.trainable_steps].mean()) == pytest.approx(1.0)
    output = torch.zeros(7, 64, dtype=torch.float64, requires_grad=True)
    eps = (
        torch.randn(64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        .expand(7, -1)
        .contiguous()
    )
    loss, _ = ops.ppo_loss(
        output,
        torch.zeros_like(output),
        torch.ones(7, dtype=torch.float64),
        table.coefficients(dtype=torch.float64),
        torch.arange(7),
        noise=eps,
        clip_range=1e-3,
        weights=weights[:7],
    )
    (gradient,) = torch.autograd.grad(loss, output)
    lengths = gradient.norm(dim=1)
    torch.testing.assert_close(lengths, lengths[:1].expand(7))


def test_unbalanced_steps_all_weigh_one() -> None:
    table = flow_sde(uniform_sigmas(4), 0.7)
    assert torch.equal(step_weights(table, balanced=False), torch.ones(4, dtype=torch.float64))


@pytest.mark.parametrize(("steps", "batch", "count"), [(4, 8, 4), (5, 48, 4), (3, 7, 2), (9, 6, 4)])
def test_a_stratified_draw_has_as_many_steps_of_every_trajectory_and_works_every_rank_alike(
    steps: int, batch: int, count: int
) -> None:
    pairs = all_pairs(torch.arange(steps) + 2, batch)
    drawn = list(minibatches(pairs, count, torch.Generator().manual_seed(1), draw="stratified"))
    found = {(int(step), int(row)) for part in drawn for step, row in zip(part.steps, part.rows, strict=True)}
    assert found == {(step + 2, row) for step in range(steps) for row in range(batch)}
    assert sum(map(len, drawn)) == steps * batch
    for part in drawn:
        per_row = torch.bincount(part.rows, minlength=batch)
        assert per_row.max() - per_row.min() <= 1 + (steps % count > 0)
        halves = torch.bincount(part.rows // math.ceil(batch / 2), minlength=2)
        assert abs(int(halves[0]) - int(halves[1])) <= 2 + math.ceil(steps / count) * (batch % 2)
    other = list(minibatches(pairs, count, torch.Generator().manual_seed(2), draw="stratified"))
    assert not torch.equal(drawn[0].rows * 100 + drawn[0].steps, other[0].rows * 100 + other[0].steps)


@pytest.mark.parametrize("draw", ["free", "stratified"])
def test_the_pairs_of_all_ranks_are_those_of_one(draw: str) -> None:
    steps, batch, size = torch.arange(3), 8, 3
    alone = minibatches(all_pairs(steps, batch), 4, torch.Generator().manual_seed(1), draw=draw)
    ranks = []
    for rank in range(size):
        share = World(rank, size).share(batch)
        own = all_pairs(steps, share.count)
        drawn = minibatches(own, 4, torch.Generator().manual_seed(1), share=share, draw=draw)
        ranks.append([(part, share.first) for part in drawn])
    for whole, *parts in zip(alone, *ranks, strict=True):
        everyone = [
            (int(step), first + int(row))
            for part, first in parts
            for step, row in zip(part.steps, part.rows, strict=True)
        ]
        expected = zip(whole.steps.tolist(), whole.rows.tolist(), strict=True)
        assert sorted(everyone) == sorted(expected)
        assert [part.total for part, _ in parts] == [len(whole)] * size
