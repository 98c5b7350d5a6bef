"""ppo_loss's options: every bound, mask, weight and kind of KL equals the reference, in one op each way."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import IS_INTERPRETED, TOLERANCES
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lacfast import ops, reference
from lacfast.reference.surrogate import bounds, surrogate_gain
from lacfast.schedule import flow_sde, kl_gains, uniform_sigmas

TABLE = flow_sde(uniform_sigmas(5), 0.7, window=(0, 4))
BATCH, STEPS = 6, torch.tensor([0, 2, 4, 1, 2, 3])
MASK = torch.tensor([True, True, True, False, True, True])

OPTIONS = {
    "asymmetric clip": {"clip_range": (1e-3, 3e-3)},
    "joint clip": {"clip_nats": 0.4},
    "joint asymmetric clip, sum": {"clip_nats": (0.2, 0.5), "reduction": "sum"},
    "dual clip": {"clip_range": 1e-3, "dual_clip": 1.002},
    "kl mask": {"kl_threshold": 1e-4},
    "kl mask and dual clip": {"kl_threshold": 1e-3, "dual_clip": 1.002},
    "ratio_norm": {"clip_range": 1e-4, "ratio": "ratio_norm"},
    "step weights": {"clip_range": 1e-3, "step_weights": torch.tensor([0.5, 1.0, 1.5, 0.25, 2.0])},
    "weights of pairs and steps": {
        "clip_range": 1e-3,
        "weights": torch.linspace(0.5, 2, BATCH),
        "step_weights": torch.linspace(1, 2, 5),
    },
    "mask": {"clip_range": 1e-3, "mask": MASK},
    "nothing left": {"clip_range": 1e-3, "mask": torch.zeros(BATCH, dtype=torch.bool)},
    "exact kl": {"clip_range": 1e-3, "kl_weight": 0.3, "kl_gains": kl_gains(TABLE, "exact")},
    "velocity kl": {"clip_range": 1e-3, "kl_weight": 0.3, "kl_gains": kl_gains(TABLE, "velocity")},
    "flow_grpo kl": {"clip_range": 1e-3, "kl_weight": 0.3, "kl_gains": kl_gains(TABLE, "flow_grpo")},
    "everything": {
        "clip_range": (1e-4, 2e-4),
        "dual_clip": 1.001,
        "ratio": "ratio_norm",
        "weights": torch.linspace(0.5, 2, BATCH),
        "step_weights": torch.linspace(1, 2, 5),
        "mask": MASK,
        "kl_weight": 0.3,
        "kl_gains": kl_gains(TABLE, "velocity"),
    },
}


def inputs(elements: int, dtype: torch.dtype, *, distance: float = 0.05, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (BATCH, elements)
    old, shift, far, eps = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(4))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return {
        "model_output": (old + distance * shift).to(dtype),
        "old_model_output": old.to(dtype),
        "anchor_output": (old + distance * far).to(dtype),
        "advantages": torch.tensor([1.0, -1.0, 2.0, -0.5, -2.0, 0.7], dtype=wide),
        "coefficients": TABLE.coefficients(dtype=wide),
        "steps": STEPS,
        "noise": eps.to(dtype),
    }


def double(arguments: dict[str, object]) -> dict[str, object]:
    return {
        name: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in arguments.items()
    }


def loss_and_gradient(op, arguments):
    output = arguments["model_output"].detach().clone().requires_grad_()
    loss, stats = op(**(arguments | {"model_output": output}))
    return loss.detach(), stats, torch.autograd.grad(loss, output, torch.tensor(3.0, dtype=loss.dtype))[0]


def assert_equal_to_the_reference(arguments, dtype):
    loss, stats, gradient = loss_and_gradient(ops.ppo_loss, arguments)
    exact_loss, exact, exact_gradient = loss_and_gradient(reference.ppo_loss, double(arguments))
    torch.testing.assert_close(loss.double(), exact_loss, rtol=2e-5, atol=2e-6)
    for name in ("rows", "step_sums"):
        value, expected = getattr(stats, name).double(), getattr(exact, name)
        largest = max(1, expected.abs().max().item())
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=2e-6 * largest)
    tolerance, unit = TOLERANCES[dtype], exact_gradient.abs().max().item()
    # Halves below 6e-8 are lost; a trainer scales its loss.
    absolute = 2 * tolerance.absolute * unit + (6e-8 if dtype == torch.float16 else 0)
    torch.testing.assert_close(gradient.double(), exact_gradient, rtol=2 * tolerance.relative, atol=absolute)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("name", OPTIONS)
def test_options_equal_the_reference(name, dtype, backend_name, poisoned_memory):
    if backend_name == "triton" and dtype != torch.float32:
        pytest.skip("storage types are the interpreter suite's; its kernels have no float64")
    options = OPTIONS[name] if dtype != torch.float64 else double(OPTIONS[name])
    assert_equal_to_the_reference(inputs(700, dtype) | options, dtype)


@pytest.mark.skipif(IS_INTERPRETED, reason="slow under the interpreter")
@settings(max_examples=40, deadline=None)
@given(
    elements=st.integers(1, 2100),
    low=st.floats(1e-4, 1e-1),
    high=st.floats(1e-4, 1e-1),
    dual=st.sampled_from([math.inf, 1.01]),
    ratio=st.sampled_from(["innovation", "ratio_norm"]),
    mask=st.lists(st.booleans(), min_size=BATCH, max_size=BATCH),
    seed=st.integers(0, 2**16),
)
def test_any_size_and_option_equals_the_reference(elements, low, high, dual, ratio, mask, seed):
    options = {"clip_range": (low, high), "dual_clip": dual, "ratio": ratio, "mask": torch.tensor(mask)}
    arguments = inputs(elements, torch.float64, seed=seed) | options | {"kl_weight": 0.1}
    assert_equal_to_the_reference(arguments, torch.float64)


@pytest.mark.parametrize("name", ["dual clip", "kl mask", "ratio_norm", "velocity kl", "mask"])
def test_options_pass_gradcheck(name):
    arguments = inputs(5, torch.float64, distance=0.02) | double(OPTIONS[name])

    def loss(output):
        return ops.ppo_loss(**(arguments | {"model_output": output}))[0]

    assert torch.autograd.gradcheck(loss, [arguments["model_output"].clone().requires_grad_()], eps=1e-7)


@pytest.mark.parametrize(
    ("log_ratio", "advantage", "limits", "gain", "side"),
    [
        (0.3, 1.0, {"clip_range": (0.1, 0.2)}, 1.2, 1),
        (-0.3, -1.0, {"clip_range": (0.1, 0.2)}, -0.9, -1),
        (0.3, -1.0, {"clip_range": 0.1}, -math.exp(0.3), 0),
        (2.0, -1.0, {"clip_range": 0.1, "dual_clip": 3.0}, -3.0, 1),
        (2.0, 1.0, {"clip_range": 0.1, "dual_clip": 3.0}, 1.1, 1),
        (0.3, 1.0, {"kl_threshold": 0.5}, 0.0, 1),
        (-0.3, -1.0, {"kl_threshold": 0.5}, 0.0, -1),
        (-0.3, 1.0, {"kl_threshold": 0.5}, math.exp(-0.3), 0),
        (0.3, 1.0, {"kl_threshold": 0.7}, math.exp(0.3), 0),
    ],
)
def test_the_gain_is_what_the_papers_say(log_ratio, advantage, limits, gain, side):
    unset = {"clip_range": None, "clip_nats": None, "kl_threshold": None, "dual_clip": math.inf}
    kl_old = torch.tensor([0.6], dtype=torch.float64)
    log_ratios, advantages = torch.tensor([[log_ratio], [advantage]], dtype=torch.float64)
    value, found = surrogate_gain(log_ratios, kl_old, advantages, bounds(**(unset | limits), nats_per_unit=1))
    assert value.item() == pytest.approx(gain)
    assert found.item() == side


def test_masked_rows_are_not_read(backend_name):
    clean = inputs(300, torch.float32) | {"clip_range": 1e-3, "kl_weight": 0.1, "mask": MASK}
    poisoned = dict(clean)
    for name in ("model_output", "old_model_output", "anchor_output", "noise", "advantages"):
        poisoned[name] = torch.where(MASK.view(-1, *(1,) * (clean[name].ndim - 1)), clean[name], torch.nan)
    (loss, stats, gradient), (expected_loss, expected_stats, expected) = (
        loss_and_gradient(ops.ppo_loss, arguments) for arguments in (poisoned, clean)
    )
    assert torch.equal(loss, expected_loss)
    assert torch.equal(stats.rows, expected_stats.rows)
    assert torch.equal(stats.step_sums, expected_stats.step_sums)
    assert torch.equal(gradient, expected)
    assert not gradient[~MASK].any()


def test_a_mask_is_a_smaller_batch(backend_name):
    arguments = inputs(300, torch.float32) | {"clip_range": 1e-3}
    loss, stats, gradient = loss_and_gradient(ops.ppo_loss, arguments | {"mask": MASK})
    smaller = {
        name: value[MASK] if isinstance(value, Tensor) and name != "coefficients" else value
        for name, value in arguments.items()
    }
    expected_loss, expected_stats, expected = loss_and_gradient(ops.ppo_loss, smaller)
    torch.testing.assert_close(loss, expected_loss)
    assert torch.equal(stats.rows[MASK], expected_stats.rows)
    torch.testing.assert_close(stats.step_sums, expected_stats.step_sums)
    torch.testing.assert_close(gradient[MASK], expected)


def test_sums_per_step_count_each_pair_once(backend_name):
    arguments = inputs(300, torch.float32) | {"clip_range": 1e-3, "mask": MASK}
    _, stats, _ = loss_and_gradient(ops.ppo_loss, arguments)
    assert stats.step_sums[:, 0].tolist() == [1, 0, 2, 1, 1]
    torch.testing.assert_close(stats.step_sums[2, 1:4], stats.rows[[1, 4], :3].sum(0))
    assert torch.equal(
        stats.step_sums[:, 4:].sum(0),
        stats.step_sums.new_tensor([(stats.clipped > 0).sum(), (stats.clipped < 0).sum()]),
    )


class Dispatched(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["everything", "asymmetric clip"])
def test_one_dispatched_op_forward_and_one_backward(name):
    arguments = inputs(300, torch.float32) | OPTIONS[name]
    arguments["model_output"].requires_grad_()
    one = torch.ones(())
    with Dispatched() as forward:
        loss, _ = ops.ppo_loss(**arguments)
    with Dispatched() as backward:
        torch.autograd.grad(loss, arguments["model_output"], one)
    assert forward.names == ["lacfast.ppo_loss.default"]
    assert backward.names == ["lacfast.ppo_loss_backward.default"]


def test_the_eager_path_calls_torch_for_memory_alone():
    arguments = inputs(300, torch.float32) | OPTIONS["everything"]
    arguments["model_output"].requires_grad_()
    one = torch.ones(())
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        loss, _ = ops.ppo_loss(**arguments)
        torch.autograd.grad(loss, arguments["model_output"], one)
    called = {event.key for event in profile.key_averages() if event.key.startswith("aten::")}
    assert called <= {"aten::new_empty", "aten::empty", "aten::empty_like", "aten::empty_strided"}


def test_the_compiled_loss_is_the_eager_one():
    arguments = inputs(300, torch.float32) | OPTIONS["everything"]

    def total(**keywords):
        loss, stats = ops.ppo_loss(**keywords)
        return loss, stats.step_sums

    compiled = torch.compile(total, fullgraph=True)
    results = []
    for function in (total, compiled):
        arguments["model_output"] = arguments["model_output"].detach().requires_grad_()
        loss, sums = function(**arguments)
        results.append((loss.detach(), sums, torch.autograd.grad(loss, arguments["model_output"])[0]))
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_changes_nothing(dtype, backend_name):
    if backend_name == "triton":
        pytest.skip("decided above the kernels")
    arguments = inputs(300, dtype) | OPTIONS["everything"]
    expected = loss_and_gradient(ops.ppo_loss, arguments)
    with torch.autocast("cpu", torch.bfloat16):
        results = loss_and_gradient(ops.ppo_loss, arguments)
    assert results[2].dtype == dtype
    assert torch.equal(results[0], expected[0])
    assert torch.equal(results[2], expected[2])


def test_only_inputs_and_single_numbers_are_saved_for_backward():
    arguments = inputs(300, torch.float32) | OPTIONS["everything"]
    arguments["model_output"].requires_grad_()
    known = {value.data_ptr() for value in arguments.values() if isinstance(value, Tensor)}
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        ops.ppo_loss(**arguments)
    own = [tensor for tensor in saved if tensor.data_ptr() not in known]
    assert [tuple(tensor.shape) for tensor in own] == [(BATCH, 3)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give exactly one of clip_range=None, clip_nats=None, kl_threshold=None"),
        ({"clip_range": 1e-4, "kl_threshold": 1e-5}, "give exactly one of"),
        ({"clip_range": (1e-4, 0.0)}, r"clip_range is \(0.0001, 0.0\); it must be above 0"),
        ({"clip_nats": -1.0}, "clip_nats is -1.0"),
        ({"kl_threshold": 0.0}, "kl_threshold is 0.0"),
        ({"clip_range": 1e-4, "dual_clip": 1.0}, "dual_clip is 1.0; it must be above 1"),
        ({"clip_range": 1e-4, "ratio": "grpo"}, "unknown ratio 'grpo'; known: innovation, ratio_norm"),
        ({"clip_range": 1e-4, "step_weights": torch.ones(BATCH)}, r"step_weights has shape \(6,\)"),
        ({"clip_range": 1e-4, "mask": torch.ones(BATCH)}, "mask has dtype torch.float32.*torch.bool"),
        ({"clip_range": 1e-4, "kl_gains": torch.ones(3)}, r"kl_gains has shape \(3,\)"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        ops.ppo_loss(**inputs(4, torch.float32), **options)


def test_an_unknown_kl_kind_is_named():
    with pytest.raises(ValueError, match="unknown kl kind 'kl3'; known: exact, velocity, flow_grpo"):
        kl_gains(TABLE, "kl3")


def test_the_exact_gains_are_the_kernels_own():
    arguments = inputs(64, torch.float64) | {"clip_range": 1e-3, "kl_weight": 0.5}
    derived = loss_and_gradient(ops.ppo_loss, arguments)
    looked_up = loss_and_gradient(
        ops.ppo_loss, arguments | {"kl_gains": kl_gains(TABLE, "exact", dtype=torch.float64)}
    )
    torch.testing.assert_close(derived[0], looked_up[0])
    torch.testing.assert_close(derived[2], looked_up[2])
