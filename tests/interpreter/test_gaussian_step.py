"""The denoising step in Triton against the reference in float64."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from lacfast.kernels.gaussian_step import gaussian_step
from torch import Tensor

from lacfast import reference
from lacfast.kernels import launch
from lacfast.ops.gaussian_step import GaussianStep, GaussianStepOutputs
from lacfast.records import NoiseKey

pytestmark = pytest.mark.interpreter

# One element, odd, one program of several blocks, several programs with a ragged last one.
SIZES = [1, 7, 512, 777, 1500, 3001, 5001]
BATCH = 4
# (guided, has_key, size, dtype of the sample, dtype of the outputs)
CASES = [
    *((guided, guided, size, torch.float32, torch.float32) for size in SIZES for guided in (False, True)),
    *((guided, not guided, 5001, torch.float32, torch.float32) for guided in (False, True)),
    *(
        (guided, guided, size, sample, output)
        for guided, size in ((False, 7), (True, 5001))
        for sample, output in (
            (torch.float32, torch.bfloat16),
            (torch.bfloat16, torch.bfloat16),
            (torch.float16, torch.float16),
        )
    ),
]


@dataclass(frozen=True)
class Step:
    """Arguments of one call and the outputs it fills."""

    sample: Tensor
    model_output: Tensor
    uncond_output: Tensor | None
    guidance_scale: Tensor | None
    noise: Tensor | None
    prev_sample: Tensor
    log_prob: Tensor
    guided_output: Tensor | None

    def run(
        self,
        coefficients: Tensor,
        steps: Tensor,
        key: tuple[Tensor, Tensor] | tuple[None, None],
        scale: float,
    ) -> None:
        inputs = GaussianStep(
            self.sample, self.model_output, self.uncond_output, self.guidance_scale, coefficients, steps,
            self.noise, *key, scale,
        )  # fmt: skip
        gaussian_step(inputs, GaussianStepOutputs(self.prev_sample, self.log_prob, self.guided_output))


@pytest.fixture
def make_step(draw: Callable[..., Tensor], poisoned: Callable[..., Tensor]) -> Callable[..., Step]:
    def make(
        num_elements: int,
        sample: torch.dtype,
        output: torch.dtype,
        *,
        guided: bool,
        noise: torch.dtype | None,
    ) -> Step:
        shape = (BATCH, num_elements)
        return Step(
            sample=draw(*shape, dtype=sample),
            model_output=draw(*shape, dtype=output),
            uncond_output=draw(*shape, dtype=output) if guided else None,
            guidance_scale=torch.tensor([3.5]) if guided else None,
            noise=None if noise is None else draw(*shape, dtype=noise),
            prev_sample=poisoned(*shape, dtype=sample),
            log_prob=poisoned(BATCH),
            guided_output=poisoned(*shape, dtype=output) if guided else None,
        )

    return make


def test_sizes_reach_every_launch() -> None:
    reached = {launch.pick_launch("gaussian_step", size, launch.DEFAULT)[:3] for size in SIZES}
    assert reached == set(launch.shapes("gaussian_step"))


@pytest.mark.parametrize(("guided", "has_key", "num_elements", "sample", "output"), CASES)
def test_step_equals_the_reference(
    guided: bool,
    has_key: bool,
    num_elements: int,
    sample: torch.dtype,
    output: torch.dtype,
    make_step: Callable[..., Step],
    coefficients: Tensor,
    steps: Tensor,
    key: tuple[Tensor, Tensor],
    storage_tolerance: dict[torch.dtype, float],
) -> None:
    step = make_step(num_elements, sample, output, guided=guided, noise=None if has_key else sample)
    step.run(coefficients, steps, key if has_key else (None, None), scale=1 / num_elements)
    noise = step.noise
    if noise is None:
        noise = reference.normal_noise((BATCH, num_elements), steps, NoiseKey(*key))

    used_output = step.model_output.double()
    if guided:
        uncond = step.uncond_output.double()
        guided_output = uncond + step.guidance_scale.double() * (used_output - uncond)
        tolerance = storage_tolerance[output]
        torch.testing.assert_close(step.guided_output.double(), guided_output, rtol=tolerance, atol=5e-6)
        # The transition uses the guided output as it was stored.
        used_output = step.guided_output.double()
    expected = reference.gaussian_step(
        step.sample.double(), used_output, coefficients.double(), steps, noise=noise.double()
    )
    tolerance = storage_tolerance[sample]
    torch.testing.assert_close(step.prev_sample.double(), expected.prev_sample, rtol=tolerance, atol=5e-6)

    log_prob = reference.step_log_prob(
        step.sample.double(), used_output, step.prev_sample.double(), coefficients.double(), steps
    )
    torch.testing.assert_close(step.log_prob.double(), log_prob, rtol=1e-5, atol=1e-5)
    assert step.log_prob[steps == 1].item() == 0.0


def test_sum_reduction_is_the_joint_log_prob(
    make_step: Callable[..., Step], coefficients: Tensor, steps: Tensor
) -> None:
    step = make_step(5001, torch.float32, torch.float32, guided=False, noise=torch.float32)
    step.run(coefficients, steps, (None, None), scale=1.0)
    expected = reference.step_log_prob(
        step.sample.double(), step.model_output.double(), step.prev_sample.double(),
        coefficients.double(), steps, reduction="sum",
    )  # fmt: skip
    torch.testing.assert_close(step.log_prob.double(), expected, rtol=1e-5, atol=1e-2)


def test_deterministic_steps_ignore_the_noise(make_step: Callable[..., Step], coefficients: Tensor) -> None:
    step = make_step(513, torch.float32, torch.float32, guided=False, noise=torch.float32)
    step.noise.fill_(torch.nan)
    steps = torch.ones(BATCH, dtype=torch.int64)
    step.run(coefficients, steps, (None, None), scale=1 / 513)
    mean = coefficients[1, 0] * step.sample + coefficients[1, 1] * step.model_output
    torch.testing.assert_close(step.prev_sample, mean, rtol=1e-6, atol=1e-6)
    assert torch.equal(step.log_prob, torch.zeros(BATCH))


def test_step_does_not_depend_on_the_batch(
    make_step: Callable[..., Step],
    coefficients: Tensor,
    steps: Tensor,
    key: tuple[Tensor, Tensor],
    poisoned: Callable[..., Tensor],
) -> None:
    seed, sample_ids = key
    step = make_step(5001, torch.bfloat16, torch.bfloat16, guided=True, noise=None)
    step.run(coefficients, steps, key, scale=1 / 5001)
    rows = torch.tensor([3, 0])
    part = Step(
        step.sample[rows], step.model_output[rows], step.uncond_output[rows], step.guidance_scale, None,
        poisoned(2, 5001, dtype=torch.bfloat16), poisoned(2), poisoned(2, 5001, dtype=torch.bfloat16),
    )  # fmt: skip
    part.run(coefficients, steps[rows], (seed, sample_ids[rows]), scale=1 / 5001)
    assert torch.equal(part.prev_sample, step.prev_sample[rows])
    assert torch.equal(part.log_prob, step.log_prob[rows])
    assert torch.equal(part.guided_output, step.guided_output[rows])


def test_latents_of_any_rank_are_one_row_per_sample(
    draw: Callable[..., Tensor], coefficients: Tensor, steps: Tensor, poisoned: Callable[..., Tensor]
) -> None:
    shape = (BATCH, 3, 2, 5, 5)
    arguments = {name: draw(*shape) for name in ("sample", "model_output", "noise")}
    outputs = {}
    for name, view in (("whole", shape), ("flat", (BATCH, 150))):
        outputs[name] = Step(
            **{argument: tensor.view(view) for argument, tensor in arguments.items()},
            uncond_output=None, guidance_scale=None,
            prev_sample=poisoned(*view), log_prob=poisoned(BATCH), guided_output=None,
        )  # fmt: skip
        outputs[name].run(coefficients, steps, (None, None), scale=1 / 150)
    assert torch.equal(outputs["whole"].prev_sample.flatten(1), outputs["flat"].prev_sample)
    assert torch.equal(outputs["whole"].log_prob, outputs["flat"].log_prob)
