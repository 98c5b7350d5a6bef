"""The log-probability of given transitions, and the slab of the denoising step, in Triton."""

from collections.abc import Callable

import pytest
import torch
from lacfast.kernels.gaussian_step import gaussian_step_in_place
from lacfast.kernels.step_log_prob import step_log_prob, step_log_prob_backward
from torch import Tensor

from lacfast import reference
from lacfast.kernels import launch
from lacfast.ops.gaussian_step import GaussianStep
from lacfast.ops.gaussian_step_in_place import Slab
from lacfast.ops.step_log_prob import StepLogProb, StepLogProbOutputs
from lacfast.records import NoiseKey, TrajectorySlab

pytestmark = pytest.mark.interpreter

# One element, odd, one program of several blocks, several programs with a ragged last one.
SIZES = [1, 7, 512, 777, 1500, 3001, 5001]
BATCH = 4
KINDS = [
    (torch.float32, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
]


def test_sizes_reach_every_launch() -> None:
    for op in ("step_log_prob", "step_log_prob_backward"):
        reached = {launch.pick_launch(op, size, launch.DEFAULT)[:3] for size in SIZES}
        assert reached == set(launch.shapes(op))


@pytest.mark.parametrize("is_shared", [False, True], ids=["steps", "counter"])
@pytest.mark.parametrize(
    ("num_elements", "sample", "output"),
    [*((size, *KINDS[0]) for size in SIZES), *((5001, *kinds) for kinds in KINDS[1:])],
)
def test_forward_and_backward_equal_the_reference(
    num_elements: int,
    sample: torch.dtype,
    output: torch.dtype,
    is_shared: bool,
    draw: Callable[..., Tensor],
    poisoned: Callable[..., Tensor],
    coefficients: Tensor,
    steps: Tensor,
    storage_tolerance: dict[torch.dtype, float],
) -> None:
    shape = (BATCH, num_elements)
    steps = torch.tensor([3]) if is_shared else steps
    inputs = [draw(*shape, dtype=sample), draw(*shape, dtype=output), draw(*shape, dtype=sample)]
    log_prob, grad_log_prob = poisoned(BATCH), draw(BATCH)
    gradients = [poisoned(*shape, dtype=tensor.dtype) for tensor in inputs]
    rest = (coefficients, steps, 1 / num_elements)
    record, outputs = StepLogProb(*inputs, *rest), StepLogProbOutputs(log_prob)
    step_log_prob(record, outputs)
    step_log_prob_backward(record, outputs, StepLogProbOutputs(grad_log_prob), StepLogProb(*gradients, *rest))

    leaves = [tensor.double().requires_grad_() for tensor in inputs]
    expected = reference.step_log_prob(*leaves, coefficients.double(), steps)
    torch.testing.assert_close(log_prob.double(), expected, rtol=1e-5, atol=1e-5)
    wanted = torch.autograd.grad(expected, leaves, grad_log_prob.double())
    for gradient, exact in zip(gradients, wanted, strict=True):
        # Float16 has no digits left below 6e-5.
        unit = exact.abs().max().item()
        smallest = 6e-8 if gradient.dtype == torch.float16 else 0
        tolerance = storage_tolerance[gradient.dtype] * unit + 3e-6 * unit + smallest
        torch.testing.assert_close(gradient.double(), exact, rtol=0, atol=tolerance)


def test_deterministic_steps_ignore_their_latents(
    poisoned: Callable[..., Tensor], draw: Callable[..., Tensor], coefficients: Tensor
) -> None:
    inputs = [torch.full((BATCH, 513), torch.nan) for _ in range(3)]
    log_prob, gradient = poisoned(BATCH), poisoned(BATCH, 513)
    steps = torch.tensor([1])
    rest = (coefficients, steps, 1 / 513)
    record, outputs = StepLogProb(*inputs, *rest), StepLogProbOutputs(log_prob)
    step_log_prob(record, outputs)
    grads, gradients = StepLogProbOutputs(draw(BATCH)), StepLogProb(None, gradient, None, *rest)
    step_log_prob_backward(record, outputs, grads, gradients)
    assert torch.equal(log_prob, torch.zeros(BATCH))
    assert torch.equal(gradient, torch.zeros(BATCH, 513))


@pytest.mark.parametrize("is_shared", [False, True], ids=["steps", "counter"])
@pytest.mark.parametrize("guided", [False, True], ids=["plain", "guided"])
@pytest.mark.parametrize(
    ("num_elements", "sample", "output", "kept"),
    [
        (7, torch.float32, torch.float32, torch.float32),
        (3001, torch.bfloat16, torch.bfloat16, torch.bfloat16),
        (5001, torch.float32, torch.float32, torch.float16),
        (5001, torch.float32, torch.bfloat16, torch.float32),
    ],
)
def test_a_slab_gets_its_slices_and_nothing_else(
    num_elements: int,
    sample: torch.dtype,
    output: torch.dtype,
    kept: torch.dtype,
    guided: bool,
    is_shared: bool,
    draw: Callable[..., Tensor],
    coefficients: Tensor,
    steps: Tensor,
    key: tuple[Tensor, Tensor],
) -> None:
    shape, num_steps = (BATCH, num_elements), len(coefficients)
    steps = torch.tensor([2]) if is_shared else steps
    state, cond = draw(*shape, dtype=sample), draw(*shape, dtype=output)
    guidance = (draw(*shape, dtype=output), torch.tensor([3.5])) if guided else (None, None)
    slabs = [
        TrajectorySlab(
            torch.full((num_steps + 1, *shape), torch.nan, dtype=kept),
            torch.full((num_steps, *shape), torch.nan, dtype=kept),
            torch.full((num_steps, BATCH), torch.nan),
        )
        for _ in range(2)
    ]
    ours, exact = slabs
    before, expected = state.clone(), state.clone()
    inputs = GaussianStep(state, cond, *guidance, coefficients, steps, None, *key, 1 / num_elements)
    gaussian_step_in_place(inputs, Slab(ours.latents, ours.model_outputs, ours.log_probs))
    reference.gaussian_step_(
        expected, cond, coefficients, steps, noise=NoiseKey(*key), slab=exact,
        uncond_output=guidance[0], guidance_scale=guidance[1],
    )  # fmt: skip
    # Two roundings, of the output and of the latent; the interpreter truncates bfloat16.
    tolerance = {torch.float32: 5e-6, torch.float16: 2**-8, torch.bfloat16: 2**-5}[kept]
    if output == torch.bfloat16:
        tolerance = max(tolerance, 2**-6)
    for name in ("latents", "model_outputs"):
        torch.testing.assert_close(
            getattr(ours, name), getattr(exact, name), rtol=tolerance, atol=tolerance, equal_nan=True
        )
    rows, each = torch.arange(BATCH), steps.expand(BATCH)
    assert torch.equal(state, ours.latents[each + 1, rows].to(sample))
    assert torch.equal(ours.log_probs.isnan(), exact.log_probs.isnan())
    scored = reference.step_log_prob(
        before.double(), ours.model_outputs[each, rows].double(), ours.latents[each + 1, rows].double(),
        coefficients.double(), each,
    )  # fmt: skip
    torch.testing.assert_close(ours.log_probs[each, rows].double(), scored, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("num_elements", [513, 5001])
def test_a_step_beyond_the_table_writes_nothing_into_memory_it_does_not_have(
    num_elements: int, draw: Callable[..., Tensor], coefficients: Tensor, key: tuple[Tensor, Tensor]
) -> None:
    num_steps = len(coefficients)
    # Slices before and behind the slab, where a wrong step would land.
    buffers = [
        torch.full((3 * num_steps, *shape), 7.0) for shape in ((BATCH, num_elements),) * 2 + ((BATCH,),)
    ]
    model_outputs, log_probs = (buffer[num_steps : 2 * num_steps] for buffer in buffers[1:])
    steps = torch.tensor([num_steps, -1, num_steps + 1, 2])
    latents = buffers[0][num_steps : 2 * num_steps + 1]
    state, output = draw(BATCH, num_elements), draw(BATCH, num_elements)
    inputs = GaussianStep(state, output, None, None, coefficients, steps, None, *key, 1 / num_elements)
    gaussian_step_in_place(inputs, Slab(latents, model_outputs, log_probs))
    for buffer, step in zip(buffers, (3, 2, 2), strict=True):
        written = buffer.view(3 * num_steps, BATCH, -1) != 7
        assert written[num_steps + step, 3].all()
        written[num_steps + step, 3] = False
        assert not written.any()
    # The sample says so.
    assert state[:3].isnan().all()
    assert state[3].isfinite().all()
