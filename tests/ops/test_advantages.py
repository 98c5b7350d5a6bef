"""normalized_advantages: the pipeline against its formula, its two halves, and what must not move it."""

from __future__ import annotations

import importlib
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import STORAGE_DTYPES
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from lacfast import ops, reference
from lacfast.records import NormalizedAdvantages, RewardCondition

SETTINGS = {"gamma": 0.97, "gae_lambda": 0.9, "value_lambda": 0.8}
# Sizes 1, odd (chains left over, several blocks of rows), the most heads, and one real.
SHAPES = [(1, 1, 1), (11, 7, 1), (3, 5, 3), (131, 4, 2), (2, 3, 16), (128, 10, 2)]
CONDITION = RewardCondition(reward=1, on=0, threshold=0.2)


def inputs(
    batch: int, steps: int, heads: int, dtype: torch.dtype = torch.float32, *, per_step: bool = False
) -> tuple[Tensor, ...]:
    """rewards, values, reward mean, reward std, weights."""
    maths = torch.float64 if dtype == torch.float64 else torch.float32
    generator = torch.Generator().manual_seed(batch + 10 * steps)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    rewards = normal(batch, steps, heads) if per_step else normal(batch, heads)
    statistics = (normal(heads), normal(heads).abs() + 0.3, normal(heads).abs() + 0.1)
    return rewards.to(maths), normal(batch, steps, heads).to(dtype), *(each.to(maths) for each in statistics)


def wide(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(tensor.double() for tensor in tensors)


def by_formula(
    rewards: Tensor, values: Tensor, mean: Tensor, std: Tensor, weights: Tensor, **given_settings: Any
) -> tuple[Tensor, Tensor]:
    """Advantages and raw as eager trainers write them: sums of normalised heads in torch's own std."""
    last = torch.zeros_like(values)
    last[:, -1] = (rewards - mean) / std
    raw = reference.gae(last, values, **given_settings)[0]
    combined = (weights * raw / raw.std(dim=(0, 1))).sum(dim=-1)
    return ((combined - combined.mean()) / combined.std()).clamp(-10, 10), raw


def assert_results_near(
    actual: NormalizedAdvantages, expected: NormalizedAdvantages, assert_near: Any
) -> None:
    for name in ("advantages", "raw", "targets"):
        assert_near(getattr(actual, name), getattr(expected, name))


@pytest.mark.parametrize("dtype", STORAGE_DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_result_equals_the_float64_reference(shape, dtype, backend_name, assert_near, poisoned_memory):
    given_inputs = inputs(*shape, dtype)
    result = ops.normalized_advantages(*given_inputs, **SETTINGS)
    assert result.raw.dtype == given_inputs[0].dtype
    expected = reference.normalized_advantages(*wide(given_inputs), **SETTINGS)
    assert_results_near(result, expected, assert_near)


@pytest.mark.parametrize("shape", [(7, 3, 1), (33, 10, 3)])
def test_result_is_the_eager_formula(shape, backend_name):
    given_inputs = inputs(*shape, torch.float64)
    result = ops.normalized_advantages(*given_inputs, **SETTINGS)
    advantages, raw = by_formula(*given_inputs, **SETTINGS)
    torch.testing.assert_close(result.advantages, advantages)
    torch.testing.assert_close(result.raw, raw)


@pytest.mark.parametrize(
    "change",
    [
        {"combination": "sum"},
        {"conditions": (CONDITION,)},
        {"advantage_clip": 0.5, "target_clip": 0.25},
        {"combination": "sum", "conditions": (CONDITION, RewardCondition(reward=0, on=2, threshold=0.0))},
    ],
    ids=str,
)
@pytest.mark.parametrize("is_masked", [False, True])
def test_every_rule_equals_the_reference(change, is_masked, backend_name, assert_near, poisoned_memory):
    given_inputs = inputs(37, 6, 3)
    mask = torch.rand(37, generator=torch.Generator().manual_seed(0)) > 0.3 if is_masked else None
    result = ops.normalized_advantages(*given_inputs, mask=mask, **change, **SETTINGS)
    expected = reference.normalized_advantages(*wide(given_inputs), mask=mask, **change, **SETTINGS)
    assert_results_near(result, expected, assert_near)


def test_rewards_of_every_step_are_standardised_as_their_sum(backend_name, assert_near):
    given_inputs = inputs(9, 5, 2, per_step=True)
    result = ops.normalized_advantages(*given_inputs)
    rewards, values, mean, std, weights = given_inputs
    at_the_end = ops.normalized_advantages(rewards.sum(dim=1), values, mean, std, weights)
    # With lambda 1 the first step sees the whole sum.
    torch.testing.assert_close(result.raw[:, 0], at_the_end.raw[:, 0])
    assert_results_near(result, reference.normalized_advantages(*wide(given_inputs)), assert_near)


def test_one_head_on_the_weighted_sum_equals_the_sum_of_heads(backend_name):
    rewards, values, mean, std, weights = inputs(12, 5, 3, torch.float64)
    heads = ops.normalized_advantages(rewards, values, mean, std, weights, combination="sum", **SETTINGS)
    one_value = (values @ weights)[..., None].contiguous()
    scalarized = ops.normalized_advantages(
        rewards, one_value, mean, std, weights, combination="scalarized", **SETTINGS
    )
    # GAE is linear.
    torch.testing.assert_close(scalarized.advantages, heads.advantages)
    assert scalarized.raw.shape == (12, 5, 1)


def test_an_easy_reward_counts_only_where_the_hard_one_passes(backend_name):
    rewards = torch.tensor([[0.0, 3.0], [1.0, 3.0], [1.0, 1.0], [0.0, 2.0]])
    values, ones, zeros = torch.zeros(4, 2, 2), torch.ones(2), torch.zeros(2)
    condition = RewardCondition(reward=1, on=0, threshold=0.5)
    result = ops.normalized_advantages(rewards, values, zeros, ones, ones, conditions=[condition])
    assert result.targets[:, 0, 1].tolist() == [0.0, 3.0, 1.0, 0.0]


def test_a_reward_that_is_gated_out_counts_as_its_mean_whatever_its_range(backend_name):
    rewards = torch.tensor([[0.0, -9.0], [1.0, -5.0], [1.0, -3.0], [0.0, -1.0]])
    values, mean, std = torch.zeros(4, 2, 2), torch.tensor([0.5, -4.0]), torch.tensor([0.5, 2.0])
    condition = RewardCondition(reward=1, on=0, threshold=0.5)
    result = ops.normalized_advantages(rewards, values, mean, std, torch.ones(2), conditions=[condition])
    assert result.targets[:, 0, 1].tolist() == [0.0, -0.5, 0.5, 0.0]


def test_a_condition_reads_the_reward_as_it_is_and_not_as_another_condition_left_it(backend_name):
    rewards = torch.tensor([[0.0, 9.0, 9.0], [1.0, 9.0, 9.0]])
    values, mean, ones = torch.zeros(2, 2, 3), torch.tensor([0.5, 1.0, 1.0]), torch.ones(3)
    chain = [RewardCondition(reward=1, on=0, threshold=0.5), RewardCondition(reward=2, on=1, threshold=5.0)]
    result = ops.normalized_advantages(rewards, values, mean, ones, ones, conditions=chain, target_clip=9.0)
    assert result.targets[:, 0].tolist() == [[-0.5, 0.0, 8.0], [0.5, 8.0, 8.0]]


def test_targets_with_lambda_one_are_exactly_the_standardised_rewards():
    rewards, values, mean, std, weights = inputs(64, 10, 2)
    result = ops.normalized_advantages(rewards, values, mean, std, weights, gae_lambda=0.9, target_clip=100.0)
    assert torch.equal(result.targets, ((rewards - mean) / std)[:, None].expand(64, 10, 2))


def test_advantages_have_mean_zero_and_deviation_one_over_what_counts(backend_name):
    mask = torch.arange(40) < 33
    result = ops.normalized_advantages(*inputs(40, 8, 2), mask=mask, advantage_clip=100.0)
    counted = result.advantages[mask].double()
    assert abs(float(counted.mean())) < 1e-6
    assert abs(float(counted.std()) - 1) < 1e-6
    assert torch.equal(result.advantages[~mask], torch.zeros(7, 8))


def test_padding_may_hold_anything(backend_name):
    given_inputs = list(inputs(10, 4, 2))
    alone = ops.normalized_advantages(given_inputs[0][:7], given_inputs[1][:7], *given_inputs[2:])
    given_inputs[0][7:], given_inputs[1][7:] = torch.nan, torch.inf
    padded = ops.normalized_advantages(*given_inputs, mask=torch.arange(10) < 7)
    torch.testing.assert_close(padded.advantages[:7], alone.advantages)
    assert torch.equal(padded.raw[:7], alone.raw)
    assert torch.equal(padded.advantages[7:], torch.zeros(3, 4))


@pytest.mark.parametrize("offset", [0.0, 0.1, 1e4])
def test_heads_that_do_not_vary_count_nothing(offset, backend_name):
    rewards, values, mean, std, weights = inputs(12, 4, 2)
    values[..., 1], rewards[:, 1], mean[1] = 0.0, offset + mean[1], mean[1]
    both = ops.normalized_advantages(rewards, values, mean, std, weights)
    alone = ops.normalized_advantages(
        *(each[..., :1].contiguous() for each in (rewards, values, mean, std, weights))
    )
    torch.testing.assert_close(both.advantages, alone.advantages)
    flat = [each[..., 1:].contiguous() for each in (rewards, values, mean, std, weights)]
    assert torch.equal(ops.normalized_advantages(*flat).advantages, torch.zeros(12, 4))


def test_a_value_that_is_not_a_number_is_not_hidden(backend_name):
    given_inputs = inputs(6, 3, 2)
    given_inputs[1][2, 1, 0] = torch.nan
    assert ops.normalized_advantages(*given_inputs).advantages.isnan().all()


@settings(max_examples=40, deadline=None)
@given(
    batch=st.integers(1, 70),
    steps=st.integers(1, 9),
    heads=st.integers(1, 5),
    gae_lambda=st.floats(0, 1),
    combination=st.sampled_from(["sum_normalized", "sum"]),
)
def test_any_shape_equals_the_reference(batch, steps, heads, gae_lambda, combination):
    given_inputs = inputs(batch, steps, heads, torch.float64)
    change = {"gae_lambda": gae_lambda, "combination": combination}
    result = ops.normalized_advantages(*given_inputs, **change)
    expected = reference.normalized_advantages(*given_inputs, **change)
    for name in ("advantages", "raw", "targets"):
        torch.testing.assert_close(getattr(result, name), getattr(expected, name), rtol=1e-7, atol=1e-7)


def test_two_ranks_normalise_as_one(backend_name):
    """The moments of both halves are added before either normalises, as an all-reduce would."""
    rewards, values, *rest = inputs(20, 5, 2, torch.float64)
    whole = ops.normalized_advantages(rewards, values, *rest)
    parts = [(rewards[:7], values[:7]), (rewards[7:].contiguous(), values[7:].contiguous())]
    moments: list[Tensor] = []
    for part in parts:
        ops.normalized_advantages(*part, *rest, all_reduce=lambda sums: moments.append(sums.clone()))
    total = moments[0] + moments[1]
    split = [
        ops.normalized_advantages(*part, *rest, all_reduce=lambda sums: sums.copy_(total)) for part in parts
    ]
    torch.testing.assert_close(torch.cat([part.advantages for part in split]), whole.advantages)


def test_results_are_bit_identical_from_run_to_run_and_raw_ones_for_any_batch_split(backend_name):
    rewards, values, *rest = inputs(77, 9, 3)
    together = ops.normalized_advantages(rewards, values, *rest, **SETTINGS)
    assert torch.equal(
        ops.normalized_advantages(rewards, values, *rest, **SETTINGS).advantages, together.advantages
    )
    alone = ops.normalized_advantages(rewards[40:41].clone(), values[40:41].clone(), *rest, **SETTINGS)
    assert torch.equal(alone.raw, together.raw[40:41])
    assert torch.equal(alone.targets, together.targets[40:41])


def test_pipeline_is_two_dispatched_ops():
    class Count(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.names: list[str] = []

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.names.append(str(function))
            return function(*args, **(kwargs or {}))

    given_inputs = inputs(8, 4, 2)
    with Count() as count:
        ops.normalized_advantages(*given_inputs)
    assert count.names == ["lacfast.advantage_sums.default", "lacfast.advantage_apply.default"]


@pytest.mark.parametrize("combination", ["sum_normalized", "sum", "scalarized"])
@pytest.mark.parametrize("dtype", STORAGE_DTYPES, ids=str)
def test_one_rank_alone_has_the_bits_of_both_passes_from_one_kernel(
    combination: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, poisoned_memory: Any
) -> None:
    names: list[str] = []

    def launch(chosen: str, name: str, *rest: Any) -> None:
        names.append(name)
        original(chosen, name, *rest)

    original = importlib.import_module("lacfast.ops.backend").launch
    for module in ("op", "advantages"):
        monkeypatch.setattr(importlib.import_module(f"lacfast.ops.{module}"), "launch", launch)
    rewards, values, *rest = inputs(131, 4, 3, dtype)
    values = values[..., :1].contiguous() if combination == "scalarized" else values
    changes = {"combination": combination, "mask": torch.arange(131) != 7, **SETTINGS}
    alone = ops.normalized_advantages(rewards, values, *rest, **changes)
    assert names == ["normalized_advantages"]
    joined = ops.normalized_advantages(rewards, values, *rest, **changes, all_reduce=lambda moments: None)
    assert names[1:] == ["advantage_sums", "advantage_apply"]
    for name in ("advantages", "raw", "targets"):
        assert torch.equal(getattr(alone, name), getattr(joined, name))


def test_advantages_carry_no_gradient_and_autocast_does_not_touch_them():
    given_inputs = inputs(8, 4, 2)
    plain = ops.normalized_advantages(*given_inputs)
    given_inputs[1].requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = ops.normalized_advantages(*given_inputs)
    for name in ("advantages", "raw", "targets"):
        assert torch.equal(getattr(under_autocast, name), getattr(plain, name))
        assert not getattr(under_autocast, name).requires_grad


def test_pipeline_runs_under_fake_tensors_compiles_and_passes_opcheck():
    given_inputs = inputs(5, 4, 2)
    mask = torch.arange(5) < 4

    def run(*tensors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        result = ops.normalized_advantages(*tensors[:5], mask=tensors[5], conditions=[CONDITION])
        return result.advantages, result.raw, result.targets

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for one, other in zip(compiled(*given_inputs, mask), run(*given_inputs, mask), strict=True):
        assert torch.equal(one, other)
    with FakeTensorMode() as mode:
        fake = run(*(mode.from_tensor(tensor) for tensor in (*given_inputs, mask)))
        assert [tuple(tensor.shape) for tensor in fake] == [(5, 4), (5, 4, 2), (5, 4, 2)]
    sums = (*given_inputs, mask, False, [-1, 0], [0.0, 0.5], 1.0, 0.9, 1.0, 5.0)
    torch.library.opcheck(torch.ops.lacfast.advantage_sums.default, sums)
    raw, _, moments = torch.ops.lacfast.advantage_sums(*sums)
    apply = (raw, given_inputs[4], mask, moments, False, False, 10.0)
    torch.library.opcheck(torch.ops.lacfast.advantage_apply.default, apply)


@pytest.mark.parametrize(
    ("change", "settings_", "message"),
    [
        (lambda r, v, *s: (r, v, *s), {"combination": "product"}, "unknown combination 'product'"),
        (lambda r, v, *s: (r, v[..., 0], *s), {}, r"values has shape \(4, 3\); it must be \(B, T, M\)"),
        (lambda r, v, *s: (r[:3], v, *s), {}, r"rewards has shape \(3, 2\).*must be \(4, 2\)"),
        (lambda r, v, *s: (r.double(), v, *s), {}, "rewards has dtype torch.float64.*must be torch.float32"),
        (lambda r, v, *s: (torch.zeros(4, 17), v, *s), {}, "with 1 to 16 rewards"),
        (
            lambda r, v, *s: (r, v, *s),
            {"combination": "scalarized"},
            "values has 2 heads for 2 rewards.*needs 1",
        ),
        (lambda r, v, *s: (r, v, s[0], s[1][:1], s[2]), {}, r"reward_std has shape \(1,\).*must be \(2,\)"),
        (lambda r, v, *s: (r, v, *s), {"mask": torch.ones(4)}, "mask has dtype torch.float32.*torch.bool"),
        (lambda r, v, *s: (r, v, *s), {"conditions": [replace(CONDITION, on=2)]}, "outside 0 to 1"),
        (lambda r, v, *s: (r, v, *s), {"conditions": [CONDITION] * 2}, "second condition of reward 1"),
        (
            lambda r, v, *s: (r[:, None].repeat(1, 3, 1), v, *s),
            {"conditions": [CONDITION]},
            r"pass their sum \(B, M\)",
        ),
    ],
)
def test_bad_input_is_named(change, settings_, message):
    with pytest.raises(ValueError, match=message):
        ops.normalized_advantages(*change(*inputs(4, 3, 2)), **settings_)
