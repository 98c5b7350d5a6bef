"""gaussian_step: one denoising step, its log-prob and its guidance."""

from __future__ import annotations

import math

import pytest
import torch
from tolerances import STORAGE_DTYPES
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from lacfast import ops, reference
from lacfast.records import NoiseKey

# Column std: ordinary, deterministic, small.
TABLE = torch.tensor([[0.9, -0.2, 0.3], [1.0, -0.1, 0.0], [0.8, -0.3, 0.02]])
# One element; odd and across a block of 1024; packed (B, L, D); one real size, small enough to interpret.
SHAPES = [(1, 1), (3, 3, 7, 53), (4, 17, 8), (2, 16, 32, 32)]


def _inputs(shape, dtype, *, output_dtype=None, guided=False, seed=0):
    """Arguments of gaussian_step by name, with mixed steps in the batch."""
    generator = torch.Generator().manual_seed(seed)

    def draw(storage):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(storage)

    output_dtype = output_dtype or dtype
    inputs = {
        "sample": draw(dtype),
        "model_output": draw(output_dtype),
        "coefficients": TABLE.double() if dtype == torch.float64 else TABLE,
        "steps": torch.arange(shape[0]) % len(TABLE),
        "noise": draw(dtype),
    }
    if guided:
        inputs |= {"uncond_output": draw(output_dtype), "guidance_scale": torch.tensor([2.5])}
    return inputs


def _double(inputs):
    return {
        name: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in inputs.items()
    }


def _log_prob_of_stored(inputs, result, reduction="mean"):
    """What the log-prob must be, in float64: that of the stored x' under the stored v."""
    wide = _double(inputs)
    return reference.step_log_prob(
        wide["sample"],
        result.model_output.double(),
        result.prev_sample.double(),
        wide["coefficients"],
        wide["steps"],
        reduction=reduction,
    )


@pytest.mark.parametrize("guided", [False, True], ids=["plain", "guided"])
@pytest.mark.parametrize("dtype", STORAGE_DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_forward_equals_the_reference(shape, dtype, guided, backend_name, assert_near, poisoned_memory):
    if backend_name == "triton" and dtype == torch.float64:
        pytest.skip("the Triton kernels compute in float32")
    inputs = _inputs(shape, dtype, guided=guided)
    result = ops.gaussian_step(**inputs)
    expected = reference.gaussian_step(**_double(inputs))
    assert_near(result.model_output, expected.model_output)
    # From the stored output on, so that its rounding is not counted twice.
    stored = _double(inputs) | {"model_output": result.model_output.double()}
    stored = {
        name: value for name, value in stored.items() if name not in ("uncond_output", "guidance_scale")
    }
    assert_near(result.prev_sample, reference.gaussian_step(**stored).prev_sample)
    assert_near(result.log_prob, _log_prob_of_stored(inputs, result))


def test_outputs_may_be_narrower_than_latents(backend_name, assert_near):
    inputs = _inputs((3, 4, 5), torch.float32, output_dtype=torch.bfloat16, guided=True)
    result = ops.gaussian_step(**inputs)
    assert (result.prev_sample.dtype, result.model_output.dtype) == (torch.float32, torch.bfloat16)
    assert_near(result.log_prob, _log_prob_of_stored(inputs, result))


def test_the_sum_is_the_mean_times_the_elements(backend_name):
    inputs = _inputs((3, 4, 35), torch.float32)
    mean = ops.gaussian_step(**inputs).log_prob
    torch.testing.assert_close(ops.gaussian_step(**inputs, reduction="sum").log_prob, 140 * mean)


@pytest.mark.parametrize("guided", [False, True], ids=["plain", "guided"])
@pytest.mark.parametrize("dtype", STORAGE_DTYPES, ids=str)
def test_backward_equals_the_reference(dtype, guided, backend_name, assert_near):
    if backend_name == "triton" and dtype == torch.float64:
        pytest.skip("the Triton kernels compute in float32")
    names = ["sample", "model_output", *(["uncond_output"] if guided else [])]

    def gradients(op, inputs, outputs_of):
        leaves = [inputs[name].requires_grad_() for name in names]
        result = op(**inputs)
        outputs = [getattr(result, name) for name in outputs_of]
        weights = [
            torch.linspace(-1, 1, output.numel()).view(output.shape).to(output.dtype) for output in outputs
        ]
        return torch.autograd.grad(outputs, leaves, weights, allow_unused=True)

    # The log-prob's gradient holds x' - mu, which narrow storage rounds: compared where it is not.
    used = ["prev_sample", *(["log_prob"] if dtype in (torch.float32, torch.float64) else [])]
    used += ["model_output"] if guided else []
    inputs = _inputs((3, 4, 7), dtype, guided=guided)
    expected = gradients(reference.gaussian_step, _double(inputs), used)
    for actual, wanted in zip(gradients(ops.gaussian_step, inputs, used), expected, strict=True):
        torch.testing.assert_close(
            actual.double(),
            wanted,
            **(
                {"rtol": 1e-4, "atol": 1e-5}
                if dtype == torch.float32
                else {"rtol": 2**-6, "atol": 2**-7}
                if dtype != torch.float64
                else {}
            ),
        )


def test_prev_sample_and_guidance_pass_gradcheck():
    inputs = _inputs((3, 2, 3), torch.float64, guided=True)
    leaves = ("sample", "model_output", "uncond_output")

    def outputs(*values):
        result = ops.gaussian_step(**(inputs | dict(zip(leaves, values, strict=True))))
        return result.prev_sample, result.model_output

    assert torch.autograd.gradcheck(outputs, [inputs[name].requires_grad_() for name in leaves])


def test_log_prob_of_pure_noise_is_the_gaussians_negative_entropy(backend_name):
    inputs = _inputs((1, 40_000), torch.float32)
    result = ops.gaussian_step(**inputs)
    entropy = math.log(0.3) + 0.5 * math.log(2 * math.pi * math.e)
    # Five standard errors of a mean of 40,000 chi-squares.
    assert abs(result.log_prob.item() + entropy) < 5 * 0.5 * (2 / 40_000) ** 0.5


def test_a_deterministic_step_is_exact_and_never_reads_the_noise():
    inputs = _inputs((2, 5, 300), torch.float32) | {"steps": torch.tensor([1, 1])}
    inputs["noise"] = torch.full_like(inputs["noise"], torch.nan)
    inputs["model_output"].requires_grad_()
    result = ops.gaussian_step(**inputs)
    a, b, _ = TABLE[1]
    torch.testing.assert_close(result.prev_sample, a * inputs["sample"] + b * inputs["model_output"])
    assert torch.equal(result.log_prob, torch.zeros(2))
    (gradient,) = torch.autograd.grad(result.log_prob.sum(), inputs["model_output"])
    assert torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize("dtype", STORAGE_DTYPES, ids=str)
def test_a_key_gives_the_step_of_its_own_noise(dtype, backend_name):
    if backend_name == "triton" and dtype == torch.float64:
        pytest.skip("the Triton kernels compute in float32")
    inputs = _inputs((3, 5, 211), dtype)
    key = NoiseKey.create(5, range(10, 13))
    drawn = ops.normal_noise((3, 5, 211), inputs["steps"], key)
    from_key = ops.gaussian_step(**(inputs | {"noise": key}))
    from_tensor = ops.gaussian_step(**(inputs | {"noise": drawn}))
    assert torch.equal(from_key.prev_sample, from_tensor.prev_sample)
    assert torch.equal(from_key.log_prob, from_tensor.log_prob)


def test_a_sample_does_not_depend_on_its_batch(backend_name):
    # Longer than one run of blocks, so that partial sums are added.
    inputs = _inputs((3, 3, 6000), torch.bfloat16, guided=True)
    inputs["noise"] = NoiseKey.create(5, range(3))
    together = ops.gaussian_step(**inputs)
    for row in range(3):
        rows = torch.tensor([row])
        alone = {
            name: value.select(rows) if isinstance(value, NoiseKey)
            else value if name in ("coefficients", "guidance_scale") else value[rows]
            for name, value in inputs.items()
        }  # fmt: skip
        result = ops.gaussian_step(**alone)
        for name in ("prev_sample", "log_prob", "model_output"):
            assert torch.equal(getattr(result, name), getattr(together, name)[rows])


def test_many_threads_give_the_same_bits():
    inputs = _inputs((3, 400_000), torch.float32)
    alone = ops.gaussian_step(**inputs)
    torch.set_num_threads(3)
    try:
        together = ops.gaussian_step(**inputs)
    finally:
        torch.set_num_threads(1)
    assert torch.equal(alone.prev_sample, together.prev_sample)
    assert torch.equal(alone.log_prob, together.log_prob)


def test_without_guidance_the_output_is_the_argument_itself(backend_name):
    inputs = _inputs((3, 4), torch.float32)
    assert ops.gaussian_step(**inputs).model_output is inputs["model_output"]


@pytest.mark.parametrize("guided", [False, True], ids=["plain", "guided"])
def test_the_op_compiles_whole_and_runs_under_fake_tensors(guided):
    inputs = _inputs((3, 4, 5), torch.float32, guided=guided) | {"noise": NoiseKey.create(5, range(3))}
    inputs["model_output"].requires_grad_()

    def step(**arguments):
        result = ops.gaussian_step(**arguments)
        return result.prev_sample.sum() + result.log_prob.sum() + result.model_output.square().sum()

    eager, compiled = step(**inputs), torch.compile(step, fullgraph=True, backend="aot_eager")(**inputs)
    assert torch.equal(eager, compiled)
    for one, other in zip(
        *(torch.autograd.grad(loss, inputs["model_output"]) for loss in (eager, compiled)), strict=True
    ):
        torch.testing.assert_close(one, other)
    # Without non-fake inputs, and any read of a value (.item(), nonzero) raises.
    with FakeTensorMode() as mode:
        fake = {name: mode.from_tensor(value) for name, value in inputs.items() if isinstance(value, Tensor)}
        key = NoiseKey(mode.from_tensor(torch.tensor([5])), mode.from_tensor(torch.arange(3)))
        result = ops.gaussian_step(**fake, noise=key)
    assert result.prev_sample.shape == (3, 4, 5)
    assert result.log_prob.shape == (3,)


@pytest.mark.parametrize("guided", [False, True], ids=["plain", "guided"])
def test_the_registered_op_passes_opcheck(guided):
    inputs = _inputs((3, 4, 5), torch.float32, guided=guided)
    leaves = (inputs["sample"].requires_grad_(), inputs["model_output"].requires_grad_())
    guidance = (
        (inputs["uncond_output"].requires_grad_(), inputs["guidance_scale"]) if guided else (None, None)
    )
    noise = (inputs["noise"], None, None)
    torch.library.opcheck(
        torch.ops.lacfast.gaussian_step.default,
        (*leaves, *guidance, inputs["coefficients"], inputs["steps"], *noise, 0.05),
    )


def _with(**changes):
    return lambda inputs: inputs | {name: change(inputs[name]) for name, change in changes.items()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_with(sample=lambda x: x.long()), "sample has dtype torch.int64; use torch.float32"),
        (_with(sample=lambda x: x[0, 0, 0]), r"sample has shape \(5,\); it must be"),
        (_with(sample=lambda x: x.mT), r"sample .*pass sample.contiguous\(\)"),
        (
            _with(model_output=lambda v: v.to("meta")),
            "model_output is on meta but sample on cpu; move it with",
        ),
        (_with(model_output=lambda v: v.double()), "model_output has dtype torch.float64"),
        (
            _with(model_output=lambda v: v[:1]),
            r"model_output has shape \(1, 2, 4, 5\).*must be \(3, 2, 4, 5\)",
        ),
        (
            _with(noise=lambda e: e.transpose(1, 2).contiguous().transpose(1, 2)),
            r"noise .*pass noise.contiguous",
        ),
        (_with(noise=lambda e: e.half()), "noise has dtype torch.float16"),
        (_with(noise=lambda e: NoiseKey.create(0, range(2))), r"noise.sample_ids has shape \(2,\)"),
        (
            _with(coefficients=lambda c: c.double()),
            "coefficients has dtype torch.float64.*must be torch.float32",
        ),
        (_with(coefficients=lambda c: c[:, :2]), r"coefficients has shape \(3, 2\)"),
        (_with(steps=lambda s: s.int()), "steps has dtype torch.int32"),
        (_with(steps=lambda s: s + 1), r"steps\[2\] = 3 is outside the coefficients' 3 rows; use 0 to 2"),
        (lambda inputs: inputs | {"guidance_scale": torch.ones(1)}, "only guidance_scale is given"),
        (lambda inputs: inputs | {"reduction": "median"}, "unknown reduction 'median'; known: 'mean'"),
    ],
)
def test_bad_input_is_named(change, message):
    inputs = _inputs((3, 2, 4, 5), torch.float32)
    with pytest.raises(ValueError, match=message):
        ops.gaussian_step(**change(inputs))


def test_an_unknown_or_unusable_backend_is_refused():
    with (
        pytest.raises(ValueError, match="unknown backend 'metal'; known: reference, cpu"),
        ops.backend("metal"),
    ):
        pass
    for name, state in ops.available().items():
        if state != "usable" and name != "triton":
            with pytest.raises(ValueError, match=f"backend '{name}' is not usable here: "), ops.backend(name):
                pass
    assert ops.available()["cpu"] == "usable"
