"""step_log_prob: the log-probability of given transitions, and its gradients."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import STORAGE_DTYPES
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from lacfast import ops, reference

# Column std: ordinary, deterministic, small.
TABLE = torch.tensor([[0.9, -0.2, 0.3], [1.0, -0.1, 0.0], [0.8, -0.3, 0.05]])
LEAVES = ("sample", "model_output", "prev_sample")
# One element; odd and across a block of 1024; packed (B, L, D); several runs of blocks.
SHAPES = [(1, 1), (3, 3, 7, 53), (4, 17, 8), (2, 16, 33, 32)]


def _inputs(shape, dtype=torch.float32, output_dtype=None, prev_dtype=None, seed=0) -> dict[str, Tensor]:
    """Arguments by name: mixed steps, and latents a few standard deviations from the mean."""
    generator = torch.Generator().manual_seed(seed)

    def draw(storage):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(storage)

    sample, model_output = draw(dtype), draw(output_dtype or dtype)
    steps = torch.arange(shape[0]) % len(TABLE)
    a, b, std = (c.view(-1, *[1] * (len(shape) - 1)) for c in TABLE.double()[steps].unbind(dim=1))
    prev_sample = a * sample.double() + b * model_output.double() + std * draw(torch.float64)
    return {
        "sample": sample,
        "model_output": model_output,
        "prev_sample": prev_sample.to(prev_dtype or dtype),
        "coefficients": TABLE.double() if dtype == torch.float64 else TABLE,
        "steps": steps,
    }


def _double(inputs):
    return {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()}


def _gradients(op, inputs, wanted=LEAVES, **settings):
    inputs = {name: x.detach().requires_grad_(name in wanted) for name, x in inputs.items()}
    log_prob = op(**inputs, **settings)
    weights = torch.linspace(-1, 1, len(log_prob) + 1, dtype=log_prob.dtype)[1:]
    return log_prob, torch.autograd.grad(log_prob, [inputs[name] for name in wanted], weights)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("dtype", STORAGE_DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_forward_and_backward_equal_the_reference(shape, dtype, reduction, backend_name, poisoned_memory):
    if backend_name == "triton" and dtype == torch.float64:
        pytest.skip("the Triton kernels compute in float32")
    inputs = _inputs(shape, dtype)
    log_prob, gradients = _gradients(ops.step_log_prob, inputs, reduction=reduction)
    expected, wanted = _gradients(reference.step_log_prob, _double(inputs), reduction=reduction)
    exact = {"rtol": 1e-11, "atol": 1e-12}
    # Float32 maths of a difference of numbers near 1, divided by a small variance.
    torch.testing.assert_close(
        log_prob.double(), expected, **(exact if dtype == torch.float64 else {"rtol": 5e-5, "atol": 1e-5})
    )
    for leaf, actual, gradient in zip(LEAVES, gradients, wanted, strict=True):
        assert actual.dtype == inputs[leaf].dtype
        unit = gradient.abs().max().item()
        rounding = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-9}
        tolerance = {"rtol": 0, "atol": unit * rounding[dtype] + 1e-7} if dtype in rounding else exact
        torch.testing.assert_close(actual.double(), gradient, **tolerance)


def test_sample_output_and_next_sample_may_differ_in_dtype(backend_name):
    kinds = (torch.float32, torch.bfloat16, torch.float16)
    for sample, output, prev in product(kinds, repeat=3):
        inputs = _inputs((3, 4, 5), sample, output, prev)
        log_prob, gradients = _gradients(ops.step_log_prob, inputs)
        expected = reference.step_log_prob(**_double(inputs))
        torch.testing.assert_close(log_prob.double(), expected, rtol=5e-5, atol=1e-5)
        assert [gradient.dtype for gradient in gradients] == [sample, output, prev]


@pytest.mark.parametrize("wanted", [LEAVES[:1], LEAVES[1:2], LEAVES[2:], LEAVES[::2]], ids=str)
def test_a_gradient_is_the_same_whichever_others_are_asked_for(wanted, backend_name):
    inputs = _inputs((3, 4, 300))
    _, every = _gradients(ops.step_log_prob, inputs)
    _, some = _gradients(ops.step_log_prob, inputs, wanted)
    for name, gradient in zip(wanted, some, strict=True):
        assert torch.equal(gradient, every[LEAVES.index(name)])


def test_it_scores_a_sampled_step_as_the_sampler_did(backend_name):
    inputs = _inputs((3, 5, 400))
    noise = torch.randn(3, 5, 400, generator=torch.Generator().manual_seed(1))
    del inputs["prev_sample"]
    step = ops.gaussian_step(**inputs, noise=noise)
    log_prob = ops.step_log_prob(**inputs, prev_sample=step.prev_sample)
    torch.testing.assert_close(log_prob, step.log_prob, rtol=1e-5, atol=1e-6)


def test_a_deterministic_step_counts_nothing_whatever_its_latents_hold(backend_name):
    inputs = _inputs((2, 3, 700)) | {"steps": torch.tensor([1, 0])}
    for name in LEAVES:
        inputs[name][0] = torch.nan
    log_prob, gradients = _gradients(ops.step_log_prob, inputs)
    assert log_prob[0] == 0
    assert log_prob[1].isfinite()
    if backend_name != "reference":
        # Autograd of the eager formula multiplies NaN by 0.
        for gradient in gradients:
            assert torch.equal(gradient[0], torch.zeros(3, 700))
            assert gradient[1].isfinite().all()


def test_gradients_of_a_deterministic_step_are_zero_on_every_backend(backend_name):
    _, gradients = _gradients(ops.step_log_prob, _inputs((2, 3, 7)) | {"steps": torch.tensor([1, 1])})
    for gradient in gradients:
        assert torch.equal(gradient, torch.zeros(2, 3, 7))


def test_a_shared_counter_is_the_same_step_for_every_sample(backend_name):
    inputs = _inputs((3, 4, 300))
    for step in range(3):
        one = _gradients(ops.step_log_prob, inputs | {"steps": torch.tensor([step])})
        several = _gradients(ops.step_log_prob, inputs | {"steps": torch.full((3,), step)})
        assert torch.equal(one[0], several[0])
        assert all(torch.equal(*pair) for pair in zip(one[1], several[1], strict=True))


def test_a_sample_depends_neither_on_its_batch_nor_on_the_run(backend_name):
    inputs = _inputs((3, 2, 9001), torch.bfloat16)
    together = _gradients(ops.step_log_prob, inputs, reduction="sum")
    again = _gradients(ops.step_log_prob, inputs, reduction="sum")
    assert torch.equal(together[0], again[0])
    for row in range(3):
        alone = {name: x if name == "coefficients" else x[row : row + 1] for name, x in inputs.items()}
        assert torch.equal(ops.step_log_prob(**alone, reduction="sum"), together[0][row : row + 1])


def test_many_threads_give_the_same_bits():
    inputs = _inputs((3, 400_000))
    alone = _gradients(ops.step_log_prob, inputs)
    torch.set_num_threads(3)
    try:
        together = _gradients(ops.step_log_prob, inputs)
    finally:
        torch.set_num_threads(1)
    assert torch.equal(alone[0], together[0])
    assert all(torch.equal(*pair) for pair in zip(alone[1], together[1], strict=True))


def test_the_cpp_code_passes_gradcheck():
    inputs = _inputs((3, 2, 3), torch.float64)
    others = {"coefficients": inputs["coefficients"], "steps": inputs["steps"]}
    with ops.backend("cpu"):
        assert torch.autograd.gradcheck(
            lambda *leaves: ops.step_log_prob(*leaves, **others),
            [inputs[name].requires_grad_() for name in LEAVES],
        )


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 4), st.integers(1, 2200), st.sampled_from([torch.float32, torch.bfloat16]))
def test_any_shape_equals_the_reference(batch, elements, dtype):
    inputs = _inputs((batch, elements), dtype, seed=elements)
    expected = reference.step_log_prob(**_double(inputs))
    torch.testing.assert_close(ops.step_log_prob(**inputs).double(), expected, rtol=5e-5, atol=1e-5)


def test_autocast_changes_nothing(backend_name):
    inputs = _inputs((3, 4, 50), torch.float32, torch.bfloat16)
    plain = _gradients(ops.step_log_prob, inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = _gradients(ops.step_log_prob, inputs)
        step = ops.gaussian_step(
            *(inputs[name] for name in ("sample", "model_output", "coefficients", "steps")),
            noise=inputs["sample"],
        )
    assert cast[0].dtype == torch.float32
    assert step.prev_sample.dtype == torch.float32
    assert torch.equal(plain[0], cast[0])
    assert all(torch.equal(*pair) for pair in zip(plain[1], cast[1], strict=True))


@pytest.mark.parametrize("wanted", [LEAVES, LEAVES[1:2]], ids=["all", "model_output"])
def test_the_op_compiles_whole(wanted):
    inputs = _inputs((3, 4, 5))
    eager = _gradients(ops.step_log_prob, inputs, wanted)
    compiled = torch.compile(ops.step_log_prob, fullgraph=True, backend="aot_eager")
    traced = _gradients(compiled, inputs, wanted)
    assert torch.equal(eager[0], traced[0])
    assert all(torch.equal(*pair) for pair in zip(eager[1], traced[1], strict=True))


def test_the_op_under_fake_tensors_looks_at_no_value():
    inputs = _inputs((3, 4, 5))
    with FakeTensorMode() as mode:
        fake = {name: mode.from_tensor(x) for name, x in inputs.items()}
        log_prob, gradients = _gradients(ops.step_log_prob, fake)
    assert log_prob.shape == (3,)
    assert all(gradient.shape == (3, 4, 5) for gradient in gradients)


def test_the_registered_ops_pass_opcheck():
    inputs = _inputs((3, 4, 5))
    leaves = [inputs[name].requires_grad_() for name in LEAVES]
    arguments = (*leaves, inputs["coefficients"], inputs["steps"], 0.05)
    torch.library.opcheck(torch.ops.lacfast.step_log_prob.default, arguments)
    detached = (*(leaf.detach() for leaf in leaves), *arguments[3:])
    torch.library.opcheck(
        torch.ops.lacfast.step_log_prob_backward.default, (*detached, torch.ones(3), [True, True, False])
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prev_sample": torch.zeros(3, 4)}, r"prev_sample has shape \(3, 4\); with this sample it must be"),
        ({"prev_sample": torch.zeros(3, 4, 5).double()}, "prev_sample has dtype torch.float64"),
        ({"model_output": torch.zeros(3, 5, 4).mT}, r"pass model_output.contiguous\(\)"),
        ({"steps": torch.tensor([0, 3, 0])}, r"steps\[1\] = 3 is outside the coefficients' 3 rows"),
        ({"steps": torch.tensor([0, 1])}, r"steps has shape \(2,\); with this sample it must be \(3,\)"),
    ],
)
def test_bad_input_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        ops.step_log_prob(**_inputs((3, 4, 5)) | changes)
