"""gaussian_step_: a sample moved in place, and its slices of a slab."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from lacfast import ops, reference
from lacfast.records import NoiseKey, TrajectorySlab

# Column std: ordinary, deterministic, small.
TABLE = torch.tensor([[0.9, -0.2, 0.3], [1.0, -0.1, 0.0], [0.8, -0.3, 0.02]])
STEPS = len(TABLE)
SHAPE = (3, 5, 211)
# (sample, output, slab's latents, slab's outputs)
DTYPES = [
    (torch.float32, torch.float32, torch.float32, torch.float32),
    (torch.float32, torch.bfloat16, torch.float32, torch.float32),
    (torch.float32, torch.float32, torch.bfloat16, torch.float16),
    (torch.bfloat16, torch.bfloat16, torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float32, torch.float16, torch.bfloat16),
    (torch.float64, torch.float64, torch.float64, torch.float64),
]


class CountOps(TorchDispatchMode):
    """Names of the operations that reach the dispatcher."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def _inputs(shape=SHAPE, dtype=torch.float32, output_dtype=None, *, guided=False, seed=0) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)

    def draw(storage):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(storage)

    output_dtype = output_dtype or dtype
    inputs = {
        "sample": draw(dtype),
        "model_output": draw(output_dtype),
        "coefficients": TABLE.double() if dtype == torch.float64 else TABLE,
        "steps": torch.arange(shape[0]) % STEPS,
        "noise": NoiseKey.create(5, range(shape[0])),
    }
    if guided:
        inputs |= {"uncond_output": draw(output_dtype), "guidance_scale": torch.tensor([2.5])}
    return inputs


def _slab(shape=SHAPE, latents=torch.float32, outputs=None) -> TrajectorySlab:
    dtype = torch.float64 if latents == torch.float64 else torch.float32
    return TrajectorySlab(
        torch.full((STEPS + 1, *shape), torch.nan, dtype=latents),
        torch.full((STEPS, *shape), torch.nan, dtype=outputs or latents),
        torch.full((STEPS, shape[0]), torch.nan, dtype=dtype),
    )


def _moved(inputs: dict[str, Any]) -> dict[str, Any]:
    return inputs | {"sample": inputs["sample"].clone()}


def _bits(slab: TrajectorySlab) -> list[Tensor]:
    """Comparable with torch.equal although most slices hold NaN."""
    return [tensor.view(torch.int8) for tensor in (slab.latents, slab.model_outputs, slab.log_probs)]


@pytest.mark.parametrize("guided", [False, True], ids=["plain", "guided"])
@pytest.mark.parametrize("dtypes", DTYPES, ids=lambda dtypes: "-".join(str(dtype)[6:] for dtype in dtypes))
def test_a_slab_holds_the_transition_as_it_was_acted_on(dtypes, guided, backend_name, assert_near):
    sample_dtype, output_dtype, latents_dtype, outputs_dtype = dtypes
    if backend_name == "triton" and sample_dtype == torch.float64:
        pytest.skip("the Triton kernels compute in float32")
    inputs = _inputs(dtype=sample_dtype, output_dtype=output_dtype, guided=guided)
    before, slab = inputs["sample"].clone(), _slab(latents=latents_dtype, outputs=outputs_dtype)
    ops.gaussian_step_(**inputs, slab=slab)
    rows, steps = torch.arange(3), inputs["steps"]
    output, latent = slab.model_outputs[steps, rows], slab.latents[steps + 1, rows]
    # The state is the stored latent, and the step used the stored output.
    assert torch.equal(inputs["sample"].to(latents_dtype), latent)
    assert torch.equal(inputs["sample"], latent.to(sample_dtype))
    eps = ops.normal_noise(SHAPE, steps, inputs["noise"]).double()
    wide = (before.double(), output.double(), TABLE.double(), steps)
    narrow = latent if latents_dtype != sample_dtype else inputs["sample"]
    assert_near(narrow, reference.gaussian_step(*wide, noise=eps).prev_sample)
    scored = reference.step_log_prob(wide[0], wide[1], latent.double(), *wide[2:])
    assert_near(slab.log_probs[steps, rows], scored)
    used = inputs["model_output"].double()
    if guided:
        uncond = inputs["uncond_output"].double()
        used = (uncond + 2.5 * (used - uncond)).to(output_dtype)
    assert_near(output, used)


@pytest.mark.parametrize("guided", [False, True], ids=["plain", "guided"])
def test_in_place_and_functional_steps_have_the_same_bits(guided, backend_name):
    inputs, slab = _inputs(guided=guided), _slab()
    expected = ops.gaussian_step(**inputs)
    ops.gaussian_step_(**inputs, slab=slab)
    rows, steps = torch.arange(3), inputs["steps"]
    assert torch.equal(inputs["sample"], expected.prev_sample)
    assert torch.equal(slab.latents[steps + 1, rows], expected.prev_sample)
    assert torch.equal(slab.model_outputs[steps, rows], expected.model_output)
    assert torch.equal(slab.log_probs[steps, rows], expected.log_prob)


def test_only_the_slices_of_the_step_are_written(backend_name):
    inputs, slab = _inputs(), _slab()
    ops.gaussian_step_(**inputs, slab=slab)
    rows, steps = torch.arange(3), inputs["steps"]
    for tensor, slices in ((slab.latents, steps + 1), (slab.model_outputs, steps), (slab.log_probs, steps)):
        assert not tensor[slices, rows].isnan().any()
        tensor[slices, rows] = torch.nan
        assert tensor.isnan().all()


def test_a_shared_counter_is_the_same_step_for_every_sample(backend_name):
    inputs = _inputs(guided=True)
    per_sample, counter = _slab(), _slab()
    several, one = _moved(inputs), _moved(inputs)
    for step in range(STEPS):
        ops.gaussian_step_(**several | {"steps": torch.full((3,), step)}, slab=per_sample)
        ops.gaussian_step_(**one | {"steps": torch.tensor([step])}, slab=counter)
    assert torch.equal(several["sample"], one["sample"])
    for left, right in zip(_bits(per_sample), _bits(counter), strict=True):
        assert torch.equal(left, right)
    functional = ops.gaussian_step(**inputs | {"steps": torch.tensor([0])})
    assert functional.log_prob.shape == (3,)
    assert torch.equal(functional.prev_sample, counter.latents[1])


def test_a_slab_does_not_depend_on_the_batch_or_the_run(backend_name):
    # Longer than one run of blocks, so that partial sums are added.
    shape = (3, 2, 9001)
    inputs = _inputs(shape, torch.bfloat16, guided=True)
    together, again = _slab(shape, torch.bfloat16), _slab(shape, torch.bfloat16)
    ops.gaussian_step_(**_moved(inputs), slab=together)
    ops.gaussian_step_(**_moved(inputs), slab=again)
    for left, right in zip(_bits(together), _bits(again), strict=True):
        assert torch.equal(left, right)
    for row in range(3):
        rows = torch.tensor([row])
        alone = {
            name: value.select(rows) if isinstance(value, NoiseKey)
            else value if name in ("coefficients", "guidance_scale") else value[rows]
            for name, value in inputs.items()
        }  # fmt: skip
        slab = _slab((1, *shape[1:]), torch.bfloat16)
        ops.gaussian_step_(**alone, slab=slab)
        assert torch.equal(slab.latents[row % STEPS + 1, 0], together.latents[row % STEPS + 1, row])
        assert torch.equal(slab.log_probs[row % STEPS, 0], together.log_probs[row % STEPS, row])


def test_a_slab_too_large_for_the_caches_is_written_as_a_small_one():
    # Copies of this size bypass the caches; the odd size leaves slices unaligned.
    for elements in (2**17, 2**17 + 3):
        inputs, slab = _inputs((3, elements)), _slab((3, elements))
        expected = ops.gaussian_step(**inputs)
        ops.gaussian_step_(**inputs, slab=slab)
        rows, steps = torch.arange(3), inputs["steps"]
        assert torch.equal(slab.latents[steps + 1, rows], expected.prev_sample)
        assert torch.equal(slab.model_outputs[steps, rows], expected.model_output)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 4), st.integers(1, 1100), st.booleans(), st.booleans())
def test_any_shape_fits_its_slab(batch, elements, guided, shared):
    inputs = _inputs((batch, elements), guided=guided)
    if shared:
        inputs["steps"] = torch.tensor([2])
    slab = _slab((batch, elements))
    expected = ops.gaussian_step(**inputs)
    ops.gaussian_step_(**inputs, slab=slab)
    steps, rows = inputs["steps"].expand(batch), torch.arange(batch)
    assert torch.equal(slab.latents[steps + 1, rows], expected.prev_sample)
    assert torch.equal(slab.log_probs[steps, rows], expected.log_prob)


@pytest.mark.parametrize("guided", [False, True], ids=["plain", "guided"])
def test_a_step_is_one_dispatched_operation(guided):
    inputs, slab = _inputs(guided=guided) | {"steps": torch.tensor([1])}, _slab()
    expected = _moved(inputs)
    ops.gaussian_step_(**expected, slab=_slab())
    with CountOps() as counter:
        ops.gaussian_step_(**inputs, slab=slab)
    assert counter.names == ["lacfast.gaussian_step_in_place.default"]
    assert torch.equal(inputs["sample"], expected["sample"])


def test_steps_under_fake_tensors_look_at_no_value():
    with FakeTensorMode() as mode:
        fake = {
            name: mode.from_tensor(value)
            for name, value in _inputs(guided=True).items()
            if isinstance(value, Tensor)
        }
        fake["steps"] = mode.from_tensor(torch.zeros(1, dtype=torch.int64))
        key = NoiseKey(mode.from_tensor(torch.tensor([5])), mode.from_tensor(torch.arange(3)))
        ops.gaussian_step_(**fake, noise=key, slab=_slab())


def test_a_captured_loop_of_steps_compiles_whole():
    def three_steps(sample, model_output, steps, latents, model_outputs, log_probs, ids):
        noise = NoiseKey(torch.tensor([5]), ids)
        for _ in range(STEPS):
            slab = TrajectorySlab(latents, model_outputs, log_probs)
            ops.gaussian_step_(sample, model_output, TABLE, steps, noise=noise, slab=slab)
            steps.add_(1)
        return sample.sum()

    inputs, results = _inputs(), []
    for function in (three_steps, torch.compile(three_steps, fullgraph=True, backend="aot_eager")):
        slab, sample = _slab(), inputs["sample"].clone()
        buffers = (slab.latents, slab.model_outputs, slab.log_probs)
        steps = torch.zeros(1, dtype=torch.int64)
        total = function(sample, inputs["model_output"], steps, *buffers, torch.arange(3))
        results.append((total, sample, slab.latents[1:], slab.model_outputs, slab.log_probs, steps))
    for eager, compiled in zip(*results, strict=True):
        assert torch.equal(eager, compiled)


def test_the_registered_op_passes_opcheck():
    inputs, slab = _inputs(guided=True), _slab()
    for tensor in (slab.latents, slab.model_outputs, slab.log_probs):
        tensor.zero_()
    names = ("sample", "model_output", "uncond_output", "guidance_scale", "coefficients", "steps")
    key = (None, inputs["noise"].seed, inputs["noise"].sample_ids)
    arguments = (*(inputs[name] for name in names), *key, 0.05)
    buffers = (slab.latents, slab.model_outputs, slab.log_probs)
    torch.library.opcheck(torch.ops.lacfast.gaussian_step_in_place.default, (*arguments, *buffers))


def _replace(name, change):
    return lambda slab: TrajectorySlab(**vars(slab) | {name: change(getattr(slab, name))})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_replace("latents", lambda x: x[1:]), r"slab.latents has shape \(3, 3, 5, 211\).*\(4, 3, 5, 211\)"),
        (_replace("latents", lambda x: x.double()), "slab.latents has dtype torch.float64"),
        (_replace("model_outputs", lambda x: x[:2]), r"slab.model_outputs has shape \(2, 3, 5, 211\)"),
        (_replace("log_probs", lambda x: x.half()), "slab.log_probs has dtype torch.float16"),
        (_replace("log_probs", lambda x: x.T.contiguous().T), r"pass slab.log_probs.contiguous\(\)"),
    ],
)
def test_a_slab_that_does_not_fit_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        ops.gaussian_step_(**_inputs(), slab=change(_slab()))


def test_gradients_and_steps_beyond_the_table_are_refused():
    inputs = _inputs()
    with pytest.raises(ValueError, match=r"steps\[0\] = 3 is outside the coefficients' 3 rows"):
        ops.gaussian_step_(**inputs | {"steps": torch.tensor([3])}, slab=_slab())
    inputs["model_output"].requires_grad_()
    with pytest.raises(ValueError, match=r"gaussian_step_ has no gradients.*torch\.no_grad"):
        ops.gaussian_step_(**inputs, slab=_slab())
