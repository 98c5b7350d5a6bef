"""flow_grpo's step function against the published formula in float64, and the faults of the original."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from refusals import Refusal
from torch import Tensor

from lacfast.compat.flow_grpo import sde_step_with_logprob, sde_step_with_logprob_v1

CLOSE = 2e-6
"""Relative to the largest element; the inputs are float32, the oracle computes in float64."""


def scheduler(num_steps: int = 10, shift: float = 3.0) -> FlowMatchEulerDiscreteScheduler:
    made = FlowMatchEulerDiscreteScheduler(shift=shift)
    made.set_timesteps(num_steps)
    return made


def latents(seed: int, shape: tuple[int, ...] = (3, 4, 6, 5), dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def published(
    made: Any, step: int, velocity: Tensor, sample: Tensor, noise_level: float, kind: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, the transition's deviation and sqrt(dt) by the papers' formulas, in float64."""
    sigma, following = made.sigmas[step].double(), made.sigmas[step + 1].double()
    velocity, sample, dt = velocity.double(), sample.double(), sigma - following
    clean, pure_noise = sample - sigma * velocity, sample + (1 - sigma) * velocity
    if kind == "cps":
        std = following * math.sin(noise_level * math.pi / 2)
        return (1 - following) * clean + (following**2 - std**2).sqrt() * pure_noise, std, dt.sqrt()
    diffusion = noise_level * (sigma / (1 - (made.sigmas[1].double() if sigma == 1 else sigma))).sqrt()
    # The score of the marginal is -pure_noise / sigma.
    mean = sample - dt * (velocity + diffusion**2 / 2 * pure_noise / sigma)
    return mean, diffusion * dt.sqrt(), dt.sqrt()


def assert_close(actual: Tensor, expected: Tensor, scale: float | None = None) -> None:
    size = expected.abs().max().item() if scale is None else scale
    assert (actual.double() - expected).abs().max().item() <= CLOSE * size


@pytest.mark.parametrize("kind", ["sde", "cps"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 4, 6, 5), (3, 7, 4), (1, 2)])
def test_every_step_is_the_published_one(kind: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    made = scheduler()
    sample, velocity = latents(1, shape, dtype), latents(2, shape, dtype)
    for step, timestep in enumerate(made.timesteps):
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(7))
        mean, std, sqrt_dt = published(made, step, velocity, sample, 0.7, kind)
        prev_sample, log_prob, our_mean, our_std, our_sqrt_dt = sde_step_with_logprob(
            made,
            velocity,
            timestep[None].expand(shape[0]),
            sample,
            noise_level=0.7,
            generator=torch.Generator().manual_seed(7),
            sde_type=kind,
            return_sqrt_dt=True,
        )
        assert {prev_sample.dtype, log_prob.dtype, our_mean.dtype} == {torch.float32}
        assert_close(our_mean, mean)
        assert_close(prev_sample, mean + std * noise.double())
        column = (shape[0],) + (1,) * (len(shape) - 1)
        assert our_std.shape == our_sqrt_dt.shape == column
        assert_close(our_std, (std if kind == "cps" else std / sqrt_dt).expand(column))
        assert_close(our_sqrt_dt, sqrt_dt.expand(column))
        squared = ((prev_sample.double() - mean) ** 2).flatten(1)
        if kind == "cps":
            # The distance of x' and mu, which are of size 1 and lie together at the last step.
            assert_close(log_prob.neg().sqrt(), squared.mean(1).sqrt(), scale=1)
        else:
            terms = -squared / (2 * std**2) - std.log() - math.log(2 * math.pi) / 2
            assert_close(log_prob, terms.mean(1), scale=10 * float(1 + std.log().abs()))


@pytest.mark.parametrize("kind", ["sde", "cps"])
def test_a_given_result_is_judged_as_the_drawn_one(kind: str) -> None:
    made, sample, velocity = scheduler(), latents(1), latents(2)
    timestep = made.timesteps[[2, 0, 7]]
    drawn = sde_step_with_logprob(made, velocity, timestep, sample, sde_type=kind)
    again = sde_step_with_logprob(made, velocity, timestep, sample, prev_sample=drawn[0], sde_type=kind)
    assert torch.equal(again[0], drawn[0])
    assert torch.allclose(again[1], drawn[1], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["sde", "cps"])
@pytest.mark.parametrize("given", [True, False])
def test_gradients_flow_as_through_the_formula(kind: str, given: bool) -> None:
    made, sample, step = scheduler(), latents(1), 3
    ours, oracle = latents(2).requires_grad_(), latents(2).double().requires_grad_()
    landed = latents(5) * 0.3 + sample if given else None
    result = sde_step_with_logprob(
        made,
        ours,
        made.timesteps[step : step + 1],
        sample,
        prev_sample=landed,
        generator=None if given else torch.Generator().manual_seed(3),
        sde_type=kind,
    )
    mean, std, _ = published(made, step, oracle, sample, 0.7, kind)
    noise = torch.randn(sample.shape, generator=torch.Generator().manual_seed(3)).double()
    expected_landing = mean + std * noise if landed is None else landed.double()
    squared = ((expected_landing.detach() - mean) ** 2).flatten(1).mean(1)
    log_prob = -squared if kind == "cps" else -squared / (2 * std**2)
    weights = torch.tensor([1.0, -2.0, 0.5])
    (result[1] @ weights + result[2].sum() + (0 if given else result[0].square().sum())).backward()
    (log_prob @ weights.double() + mean.sum() + (0 if given else expected_landing.square().sum())).backward()
    assert ours.grad is not None
    assert oracle.grad is not None
    assert_close(ours.grad, oracle.grad)


def test_a_given_result_gets_no_gradient_from_its_log_prob() -> None:
    made, sample = scheduler(), latents(1)
    landed = latents(3).requires_grad_()
    log_prob = sde_step_with_logprob(
        made, latents(2).requires_grad_(), made.timesteps[:1], sample, prev_sample=landed
    )[1]
    log_prob.sum().backward()
    assert landed.grad is None


@pytest.mark.parametrize("kind", ["sde", "cps"])
def test_no_noise_is_the_schedulers_own_step_with_log_prob_zero(kind: str) -> None:
    made, own, sample, velocity = scheduler(), scheduler(), latents(1), latents(2)
    for timestep in made.timesteps:
        prev_sample, log_prob, mean, std = sde_step_with_logprob(
            made, velocity, timestep, sample, noise_level=0.0, sde_type=kind
        )
        assert torch.equal(prev_sample, mean)
        assert not log_prob.any()
        assert not std.any()
        assert_close(mean, own.step(velocity, timestep, sample)[0])


def test_no_noise_gives_a_finite_log_prob_and_gradient_to_any_result() -> None:
    made, velocity = scheduler(), latents(2).requires_grad_()
    log_prob = sde_step_with_logprob(
        made, velocity, made.timesteps[4], latents(1), noise_level=0.0, prev_sample=latents(3)
    )[1]
    log_prob.sum().backward()
    assert not log_prob.any()
    assert velocity.grad is not None
    assert not velocity.grad.any()


def test_packed_latents_are_stepped_like_images() -> None:
    made, sample, velocity = scheduler(), latents(1, (3, 4, 6, 5)), latents(2, (3, 4, 6, 5))
    timestep, noise_of = made.timesteps[[1, 4, 8]], lambda: torch.Generator().manual_seed(0)
    image = sde_step_with_logprob(made, velocity, timestep, sample, generator=noise_of())
    packed = sde_step_with_logprob(
        made, velocity.flatten(2), timestep, sample.flatten(2), generator=noise_of()
    )
    assert packed[0].shape == (3, 4, 30)
    assert torch.equal(packed[0], image[0].flatten(2))
    assert torch.equal(packed[1], image[1])


def test_the_generator_advances_as_torch_randn_does() -> None:
    made, sample, velocity = scheduler(), latents(1), latents(2)
    ours, plain = torch.Generator().manual_seed(4), torch.Generator().manual_seed(4)
    for timestep in made.timesteps[:3]:
        sde_step_with_logprob(made, velocity, timestep, sample, noise_level=0.0, generator=ours)
        torch.randn(sample.shape, generator=plain)
    assert torch.equal(ours.get_state(), plain.get_state())


def test_the_first_signature_returns_the_transitions_deviation() -> None:
    made, sample, velocity = scheduler(), latents(1), latents(2)
    timestep = made.timesteps[[0, 5, 9]]
    first = sde_step_with_logprob_v1(
        made, velocity, timestep, sample, generator=torch.Generator().manual_seed(1)
    )
    now = sde_step_with_logprob(
        made, velocity, timestep, sample, generator=torch.Generator().manual_seed(1), return_sqrt_dt=True
    )
    for one, other in zip(first[:3], now[:3], strict=True):
        assert torch.equal(one, other)
    assert torch.equal(first[3], now[3] * now[4])


def test_the_first_signature_lands_on_the_ode_when_determistic() -> None:
    made, sample, velocity = scheduler(), latents(1), latents(2)
    timestep = made.timesteps[6]
    prev_sample, log_prob, _, _ = sde_step_with_logprob_v1(made, velocity, timestep, sample, determistic=True)
    expected = scheduler().step(velocity, timestep, sample)[0]
    assert_close(prev_sample, expected)
    judged = sde_step_with_logprob(made, velocity, timestep, sample, prev_sample=expected)[1]
    assert torch.allclose(log_prob, judged, rtol=1e-5)


def test_a_new_schedule_is_noticed() -> None:
    made, sample, velocity = scheduler(4), latents(1), latents(2)
    before = sde_step_with_logprob(made, velocity, made.timesteps[1], sample)[2]
    made.set_timesteps(8)
    after = sde_step_with_logprob(made, velocity, made.timesteps[2], sample)[2]
    assert_close(after, published(made, 2, velocity, sample, 0.7, "sde")[0])
    assert not torch.allclose(before, after)


def test_a_schedule_made_in_inference_mode_can_be_trained_with() -> None:
    with torch.inference_mode():
        made = scheduler()
        sde_step_with_logprob(made, latents(2), made.timesteps[1], latents(1))
    velocity = latents(2).requires_grad_()
    timestep = made.timesteps[1].clone()
    sde_step_with_logprob(made, velocity, timestep, latents(1), prev_sample=latents(3))[1].sum().backward()
    assert velocity.grad is not None
    assert velocity.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sde_type": "ddim"}, "known: 'sde', 'cps'"),
        ({"noise_level": latents(3)}, "sde_step_with_logprob_v1"),
        ({"noise_level": None}, "sde_step_with_logprob_v1"),
        ({"noise_level": torch.ones(3)}, r"shape \(3,\) is neither a number nor.*\(3, 1, 1, 1\)"),
        ({"noise_level": torch.ones(3, 1, 1, 1), "sde_type": "cps"}, "neither a number nor, for 'sde'"),
        ({"noise_level": -0.1}, "noise_level=-0.1"),
        ({"noise_level": 1.5, "sde_type": "cps"}, r"must lie in \[0, 1\]"),
        ({"timestep": torch.tensor([960.0])}, "not among the scheduler's"),
        ({"timestep": torch.tensor([1000.0, 1000.0])}, "got 2 timesteps for 3 samples"),
    ],
)
def test_what_cannot_be_meant_is_refused(arguments: dict[str, Any], message: str) -> None:
    made = scheduler()
    call = {"timestep": made.timesteps[:1], **arguments}
    with pytest.raises(ValueError, match=message):
        sde_step_with_logprob(made, latents(2), sample=latents(1), **call)


@pytest.mark.parametrize(
    "level", [torch.tensor(0.3), torch.full((1, 1, 1, 1), 0.3), torch.full((3, 1, 1, 1), 0.3)]
)
def test_a_noise_level_may_be_a_tensor(level: torch.Tensor) -> None:
    made, sample, velocity = scheduler(), latents(1), latents(2)
    landed = latents(3)
    call = {"timestep": made.timesteps[[0, 5, 9]], "sample": sample, "prev_sample": landed}
    one = sde_step_with_logprob(made, velocity, noise_level=level, **call)
    other = sde_step_with_logprob(made, velocity, noise_level=0.3, **call)
    assert all(torch.allclose(*pair, rtol=1e-6) for pair in zip(one, other, strict=True))


def test_samples_may_have_noise_levels_of_their_own() -> None:
    made, sample, velocity, landed = scheduler(), latents(1), latents(2), latents(3)
    levels = [0.7, 0.0, 0.3]
    together = sde_step_with_logprob(
        self=made,
        model_output=velocity,
        timestep=made.timesteps[4:5],
        sample=sample,
        noise_level=torch.tensor(levels, dtype=torch.float64).view(3, 1, 1, 1),
        prev_sample=landed,
        return_sqrt_dt=True,
    )
    for row, level in enumerate(levels):
        one = slice(row, row + 1)
        alone = sde_step_with_logprob(
            made, velocity[one], made.timesteps[4], sample[one], level, landed[one], return_sqrt_dt=True
        )
        assert all(torch.equal(many[one], single) for many, single in zip(together, alone, strict=True))


def test_timesteps_that_a_pipeline_truncated_to_integers_are_understood() -> None:
    made, sample, velocity = scheduler(), latents(1), latents(2)
    exact = made.timesteps[[1, 4, 8]]
    assert not torch.equal(exact, exact.trunc())
    truncated = sde_step_with_logprob(made, velocity, exact.long(), sample, prev_sample=latents(3))
    for one, other in zip(
        truncated, sde_step_with_logprob(made, velocity, exact, sample, prev_sample=latents(3)), strict=True
    ):
        assert torch.equal(one, other)
    # Two steps of one integer leave a doubt.
    made.set_timesteps(sigmas=[0.5009, 0.5001])
    with pytest.raises(ValueError, match=r"timestep \[500\] is not among"):
        sde_step_with_logprob(made, velocity, torch.tensor([500]), sample)


def test_the_first_signature_refuses_wans_scheduler() -> None:
    made = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    made.set_timesteps(10)
    with Refusal(
        "sde_step_with_logprob_v1 is the function for SD3 and FLUX",
        cause="flow_grpo's call for Wan with UniPC, whose function of this name had other noise.",
        remedy="keep importing it from flow_grpo.diffusers_patch.wan_pipeline_with_logprob",
    ).raised():
        sde_step_with_logprob_v1(made, latents(2), made.timesteps[:1], latents(1))


def test_the_first_signature_refuses_a_result_with_a_generator() -> None:
    made = scheduler()
    with pytest.raises(ValueError, match="both given"):
        sde_step_with_logprob_v1(
            made,
            latents(2),
            made.timesteps[:1],
            latents(1),
            prev_sample=latents(3),
            generator=torch.Generator(),
        )


def test_a_scheduler_without_timesteps_is_refused() -> None:
    made = FlowMatchEulerDiscreteScheduler()
    with pytest.raises(ValueError, match="set_timesteps"):
        sde_step_with_logprob(made, latents(2), 1000.0, latents(1))
