"""log_ratio and ppo_loss: a ratio of exactly 1 before the first update, PPO's clip, one gradient."""

from __future__ import annotations

import pytest
import torch
from tolerances import STORAGE_DTYPES, TOLERANCES
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from lacfast import ops, reference
from lacfast.records import NoiseKey

TABLE = torch.tensor([[0.9, -0.2, 0.3], [1.0, -0.1, 0.0], [0.8, -0.3, 0.02]])
SHAPES = [(1, 1), (3, 3, 7, 53), (4, 17, 8), (2, 16, 32, 32)]
TERMS = ("log_ratio", "kl_old", "kl_ref")


def _inputs(shape, dtype, *, distance=0.05, seed=0):
    """Arguments of log_ratio by name: old, new and reference outputs some distance apart, mixed steps."""
    generator = torch.Generator().manual_seed(seed)
    old, shift, far, noise = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(4))
    return {
        "model_output": (old + distance * shift).to(dtype),
        "old_model_output": old.to(dtype),
        "anchor_output": (old + distance * far).to(dtype),
        "coefficients": TABLE.double() if dtype == torch.float64 else TABLE,
        "steps": torch.arange(shape[0]) % len(TABLE),
        "noise": noise.to(dtype),
    }


def _surrogate(batch, dtype):
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    advantages = torch.linspace(-1.5, 1.0, batch, dtype=wide)
    return {"advantages": advantages, "weights": torch.linspace(0.5, 2, batch, dtype=wide), "kl_weight": 0.3}


def _double(inputs):
    return {
        name: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in inputs.items()
    }


@pytest.fixture
def skip_unsupported(backend_name):
    def skip(dtype):
        if backend_name == "triton" and dtype == torch.float64:
            pytest.skip("the Triton kernels compute in float32")

    return skip


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("dtype", STORAGE_DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_terms_equal_the_reference(shape, dtype, reduction, skip_unsupported, poisoned_memory):
    skip_unsupported(dtype)
    inputs = _inputs(shape, dtype)
    terms = ops.log_ratio(**inputs, reduction=reduction)
    expected = reference.log_ratio(**_double(inputs), reduction=reduction)
    for name in TERMS:
        # Sums of both signs: the error is that of the largest terms, about std of the sum.
        scale = getattr(expected, name).abs().max().item()
        accuracy = (
            {"rtol": 1e-11, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 2e-5, "atol": 2e-5 * scale}
        )
        torch.testing.assert_close(getattr(terms, name).double(), getattr(expected, name), **accuracy)


@pytest.mark.parametrize("dtype", STORAGE_DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_loss_statistics_and_gradient_equal_the_reference(shape, dtype, skip_unsupported, poisoned_memory):
    skip_unsupported(dtype)
    inputs = _inputs(shape, dtype) | _surrogate(shape[0], dtype) | {"clip_range": 1e-3}
    wide = _double(inputs)
    inputs["model_output"].requires_grad_()
    wide["model_output"].requires_grad_()
    loss, stats = ops.ppo_loss(**inputs)
    expected_loss, expected_stats = reference.ppo_loss(**wide)
    torch.testing.assert_close(loss.double(), expected_loss, rtol=2e-5, atol=1e-6)
    assert torch.equal(stats.clipped.double(), expected_stats.clipped)
    (gradient,) = torch.autograd.grad(loss, inputs["model_output"])
    (expected,) = torch.autograd.grad(expected_loss, wide["model_output"])
    # In units of the largest component. Twice the tolerance: the reference adds two gradients, each rounded.
    tolerance, unit = TOLERANCES[dtype], expected.abs().max().item()
    absolute = tolerance.absolute * unit
    # Halves below 6e-8 are lost; a trainer scales its loss.
    absolute += 6e-8 if dtype == torch.float16 else 0.0
    torch.testing.assert_close(gradient.double(), expected, rtol=2 * tolerance.relative, atol=2 * absolute)


def test_each_terms_gradient_passes_gradcheck():
    inputs = _inputs((3, 2, 3), torch.float64, distance=0.5)

    def terms(model_output):
        result = ops.log_ratio(**(inputs | {"model_output": model_output}))
        return result.log_ratio, result.kl_old, result.kl_ref

    assert torch.autograd.gradcheck(terms, [inputs["model_output"].clone().requires_grad_()])


def test_the_loss_passes_gradcheck():
    inputs = (
        _inputs((3, 2, 3), torch.float64, distance=0.1) | _surrogate(3, torch.float64) | {"clip_range": 10.0}
    )

    def loss(model_output):
        return ops.ppo_loss(**(inputs | {"model_output": model_output}))[0]

    assert torch.autograd.gradcheck(loss, [inputs["model_output"].clone().requires_grad_()])


@pytest.mark.parametrize("noise", ["tensor", "key"])
@pytest.mark.parametrize("dtype", STORAGE_DTYPES, ids=str)
def test_ratio_is_exactly_one_before_the_first_update(dtype, noise, skip_unsupported):
    skip_unsupported(dtype)
    inputs = _inputs((3, 16, 90), dtype)
    inputs["model_output"] = inputs["old_model_output"].clone()
    if noise == "key":
        inputs["noise"] = NoiseKey.create(1, range(3))
    terms = ops.log_ratio(**inputs)
    assert torch.equal(terms.log_ratio.exp(), torch.ones_like(terms.log_ratio))
    assert torch.equal(terms.kl_old, torch.zeros_like(terms.kl_old))


def test_the_ratio_is_that_of_the_log_probs(backend_name):
    # float32 latents of one rollout step, scored the usual way and in innovation form.
    generator = torch.Generator().manual_seed(0)
    sample, old = (torch.randn(2, 4, 8, 8, generator=generator) for _ in range(2))
    new = old + 0.2 * torch.randn(2, 4, 8, 8, generator=generator)
    steps, key = torch.tensor([0, 2]), NoiseKey.create(9, range(2))
    step = ops.gaussian_step(sample, old, TABLE, steps, noise=key)
    new_log_prob = reference.step_log_prob(sample, new, step.prev_sample, TABLE, steps)
    terms = ops.log_ratio(new, old, TABLE, steps, noise=key)
    torch.testing.assert_close(terms.log_ratio, new_log_prob - step.log_prob, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("advantage", "push", "side"), [(1.0, 1, 1), (1.0, -1, 0), (-1.0, 1, 0), (-1.0, -1, -1), (0.0, 1, 0)]
)
def test_the_clip_stops_the_gradient_only_where_it_is_active(advantage, push, side, backend_name):
    inputs = _inputs((1, 64), torch.float32)
    gain = (TABLE[0, 1] / TABLE[0, 2]).item()
    # Along the noise the log-ratio grows, against it it falls.
    inputs["model_output"] = (
        inputs["old_model_output"] + push * 0.5 / gain * inputs["noise"]
    ).requires_grad_()
    loss, stats = ops.ppo_loss(**inputs, advantages=torch.tensor([advantage]), clip_range=0.05)
    assert stats.log_ratio.sign().item() == push
    assert stats.clipped.item() == side
    (gradient,) = torch.autograd.grad(loss, inputs["model_output"])
    assert (gradient.abs().max() == 0) == (side != 0 or advantage == 0)


def test_a_deterministic_step_counts_nothing_and_reads_no_noise():
    inputs = _inputs((2, 5, 300), torch.float32) | {"steps": torch.tensor([1, 1])}
    inputs["noise"] = torch.full_like(inputs["noise"], torch.nan)
    inputs["model_output"].requires_grad_()
    loss, stats = ops.ppo_loss(**inputs, **_surrogate(2, torch.float32), clip_range=1e-3)
    for name in (*TERMS, "clipped"):
        assert torch.equal(getattr(stats, name), torch.zeros(2))
    (gradient,) = torch.autograd.grad(loss, inputs["model_output"])
    assert torch.equal(gradient, torch.zeros_like(gradient))


def test_a_nan_output_is_not_hidden_by_the_clip(backend_name):
    inputs = _inputs((1, 32), torch.float32)
    inputs["model_output"][0, 3] = torch.nan
    loss, _ = ops.ppo_loss(**inputs, advantages=torch.ones(1), clip_range=0.1)
    assert loss.isnan()


def test_terms_and_gradient_of_a_sample_do_not_depend_on_its_batch(backend_name):
    inputs = _inputs((3, 3, 6000), torch.bfloat16) | {"noise": NoiseKey.create(5, range(3))}

    def run(arguments):
        output = arguments["model_output"].detach().requires_grad_()
        terms = ops.log_ratio(**(arguments | {"model_output": output}))
        total = terms.log_ratio.sum() + terms.kl_old.sum() + terms.kl_ref.sum()
        return torch.stack([getattr(terms, name) for name in TERMS], 1), torch.autograd.grad(total, output)[0]

    together = run(inputs)
    for row in range(3):
        rows = torch.tensor([row])
        alone = {
            name: value.select(rows)
            if isinstance(value, NoiseKey)
            else value
            if name == "coefficients"
            else value[rows]
            for name, value in inputs.items()
        }
        for one, all_of_them in zip(run(alone), together, strict=True):
            assert torch.equal(one, all_of_them[rows])


def test_many_threads_give_the_same_bits():
    inputs = _inputs((3, 400_000), torch.float32) | _surrogate(3, torch.float32)
    inputs["model_output"].requires_grad_()

    def run():
        loss, _ = ops.ppo_loss(**inputs, clip_range=0.1)
        return loss, torch.autograd.grad(loss, inputs["model_output"])[0]

    alone = run()
    torch.set_num_threads(3)
    try:
        together = run()
    finally:
        torch.set_num_threads(1)
    assert all(torch.equal(one, other) for one, other in zip(alone, together, strict=True))


def test_statistics_carry_no_gradient():
    inputs = _inputs((2, 8), torch.float32)
    inputs["model_output"].requires_grad_()
    _, stats = ops.ppo_loss(**inputs, advantages=torch.ones(2), clip_range=0.1)
    assert not any(getattr(stats, name).requires_grad for name in (*TERMS, "clipped"))


def test_the_loss_compiles_whole_and_runs_under_fake_tensors():
    inputs = _inputs((3, 4, 5), torch.float32) | _surrogate(3, torch.float32) | {"clip_range": 0.1}
    inputs["model_output"].requires_grad_()

    def total(**arguments):
        loss, stats = ops.ppo_loss(**arguments)
        surrogate = ("advantages", "weights", "kl_weight", "clip_range")
        terms = ops.log_ratio(**{name: value for name, value in arguments.items() if name not in surrogate})
        return loss + stats.kl_ref.sum() + terms.kl_old.sum()

    eager, compiled = total(**inputs), torch.compile(total, fullgraph=True, backend="aot_eager")(**inputs)
    assert torch.equal(eager, compiled)
    gradients = [torch.autograd.grad(loss, inputs["model_output"])[0] for loss in (eager, compiled)]
    assert torch.equal(*gradients)
    with FakeTensorMode() as mode:
        fake = {
            name: mode.from_tensor(value) if isinstance(value, Tensor) else value
            for name, value in inputs.items()
        }
        assert total(**fake).shape == ()


def test_the_registered_ops_pass_opcheck():
    inputs = _inputs((3, 4, 5), torch.float32)
    ratio = (
        inputs["model_output"].requires_grad_(),
        inputs["old_model_output"],
        inputs["anchor_output"],
        inputs["coefficients"],
        inputs["steps"],
        inputs["noise"],
        None,
        None,
        0.05,
    )
    inf = float("inf")
    no_loss = (None, None, None, None, None, False, inf, inf, inf, inf, 0.0)
    torch.library.opcheck(torch.ops.lacfast.log_ratio.default, (*ratio, *no_loss))
    per_pair = (torch.ones(3), torch.ones(3), torch.ones(3), torch.tensor([True, False, True]), None)
    settings = (False, 0.1, 0.2, 3.0, inf, 0.2)
    torch.library.opcheck(torch.ops.lacfast.ppo_loss.default, (*ratio, *per_pair, *settings))
    kept = (ratio[0].detach(), *ratio[1:8])
    torch.library.opcheck(
        torch.ops.lacfast.ppo_loss_backward.default,
        (*kept, None, torch.ones(3, 3), 0.05, *settings, torch.ones(()), None, None, None, [True]),
    )
    torch.library.opcheck(
        torch.ops.lacfast.log_ratio_backward.default,
        (*kept, 0.05, *no_loss[5:], torch.ones(3, 3), [True]),
    )


def _with(**changes):
    return lambda inputs: inputs | {name: change(inputs.get(name)) for name, change in changes.items()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_with(model_output=lambda v: v.mT), r"model_output .*pass model_output.contiguous\(\)"),
        (_with(old_model_output=lambda v: v.bfloat16()), "old_model_output has dtype torch.bfloat16"),
        (
            _with(old_model_output=lambda v: v.to("meta")),
            "old_model_output is on meta but model_output on cpu",
        ),
        (_with(anchor_output=lambda v: v[:2]), r"anchor_output has shape \(2, 4, 5\)"),
        (_with(advantages=lambda A: A[:, None]), r"advantages has shape \(3, 1\).*must be \(3,\)"),
        (_with(advantages=lambda A: A.double()), "advantages has dtype torch.float64.*must be torch.float32"),
        (_with(weights=lambda w: torch.ones(2)), r"weights has shape \(2,\)"),
        (_with(steps=lambda s: s - 1), r"steps\[0\] = -1 is outside the coefficients' 3 rows"),
        (_with(clip_range=lambda c: 0.0), "clip_range is 0.0; it must be above 0"),
        (
            _with(kl_weight=lambda k: 0.1, anchor_output=lambda v: None),
            "kl_weight is 0.1 but there is no anchor_output",
        ),
        (_with(reduction=lambda r: "max"), "unknown reduction 'max'"),
    ],
)
def test_bad_input_is_named(change, message):
    inputs = _inputs((3, 4, 5), torch.float32) | {"advantages": torch.ones(3), "clip_range": 0.1}
    with pytest.raises(ValueError, match=message):
        ops.ppo_loss(**change(inputs))
