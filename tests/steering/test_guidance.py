"""Guidance moves every kind of step up the value, by what its equation says, and by nothing at weight 0."""

from __future__ import annotations

import math

import pytest
import torch
from gaussian_backbone import ClosedFormCritic, GaussianBackbone
from torch import Tensor

from lacfast import schedule
from lacfast.config import GUIDANCE_FORMS, SamplerConfig, SteeringConfig
from lacfast.records import TransitionTable
from lacfast.steering import steer
from lacfast.steering.guidance import guided_steps, log_proposal_ratio, mean_displacement

ALPHAS = torch.linspace(0.999, 0.002, 1000, dtype=torch.float64)
TIMESTEPS = torch.tensor([900, 700, 500, 300, 100])


def ddim(prediction_type: str, eta: float = 0.5) -> TransitionTable:
    return schedule.ddim(ALPHAS, TIMESTEPS, eta, prediction_type=prediction_type)


TABLES = {
    "flow_sde": schedule.flow_sde(schedule.uniform_sigmas(6), 0.7, window=(1, 5)),
    "cps": schedule.cps(schedule.uniform_sigmas(6), 0.7),
    "ode": schedule.ode(schedule.uniform_sigmas(6)),
    "epsilon": ddim("epsilon"),
    "v_prediction": ddim("v_prediction"),
    "sample": ddim("sample"),
}


def guidance(form: str, weight: float = 0.3, **settings: object) -> SteeringConfig:
    if weight == 0:
        return SteeringConfig(method="best_of_n", particles=1)
    return SteeringConfig(
        method="best_of_n",
        particles=1,
        guidance_form=form,
        guidance_weight=weight,
        **settings,  # type: ignore[arg-type]
    )


def operands() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(3, 2, 5, generator=generator), torch.randn(3, 2, 5, generator=generator)


def test_the_tables_have_both_signs_of_b() -> None:
    assert bool((TABLES["sample"].b > 0).all())
    assert bool((TABLES["epsilon"].b < 0).all())


@pytest.mark.parametrize("form", GUIDANCE_FORMS)
@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
def test_every_form_moves_every_step_up_the_value(form: str, table: TransitionTable) -> None:
    gradient, output = operands()
    for step in range(table.num_steps):
        if float(table.sigmas[step]) == 1:
            continue
        moved = mean_displacement(gradient, output, guidance(form), table, step)
        rise = (moved * gradient).flatten(1).sum(dim=1)
        if form == "mean_shift" and float(table.std[step]) == 0:
            assert not bool(moved.any())
        else:
            assert bool((rise > 0).all())


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_the_score_form_is_ddim_with_a_shifted_epsilon(prediction_type: str) -> None:
    """eps^ = eps - w sqrt(1 - A) g through DDIM's own equation, whatever the model predicts."""
    table = ddim(prediction_type)
    gradient, output = (tensor.double() for tensor in operands())
    sample, weight = torch.ones_like(output), 0.3
    for step in range(table.num_steps - 1):
        signal = float(1 - table.sigmas[step] ** 2)
        prev_signal = float(1 - table.sigmas[step + 1] ** 2)
        if prediction_type == "epsilon":
            clean = (sample - (1 - signal) ** 0.5 * output) / signal**0.5
        elif prediction_type == "v_prediction":
            clean = signal**0.5 * sample - (1 - signal) ** 0.5 * output
        else:
            clean = output
        epsilon = (sample - signal**0.5 * clean) / (1 - signal) ** 0.5
        epsilon = epsilon - weight * (1 - signal) ** 0.5 * gradient
        clean = (sample - (1 - signal) ** 0.5 * epsilon) / signal**0.5
        direction = math.sqrt(1 - prev_signal - float(table.std[step]) ** 2)
        expected = prev_signal**0.5 * clean + direction * epsilon
        moved = mean_displacement(gradient, output, guidance("score", weight), table, step)
        mean = float(table.a[step]) * sample + float(table.b[step]) * output + moved
        torch.testing.assert_close(mean, expected)


def test_the_score_form_of_a_flow_shifts_the_velocity_by_s_over_1_minus_s() -> None:
    table = TABLES["flow_sde"]
    gradient, output = operands()
    step, s = 2, float(table.sigmas[2])
    shifted = output - 0.3 * s / (1 - s) * gradient
    moved = mean_displacement(gradient, output, guidance("score"), table, step)
    torch.testing.assert_close(moved, float(table.b[step]) * (shifted - output), rtol=1e-5, atol=1e-6)


def test_constant_and_relative_forms_have_the_length_that_they_say() -> None:
    table = TABLES["flow_sde"]
    gradient, output = operands()
    b = abs(float(table.b[2]))
    constant = mean_displacement(gradient, output, guidance("constant"), table, 2)
    torch.testing.assert_close(constant, 0.3 * b * gradient)
    relative = mean_displacement(gradient, output, guidance("relative"), table, 2)
    lengths = torch.linalg.vector_norm(relative.flatten(1), dim=1)
    torch.testing.assert_close(lengths, 0.3 * b * torch.linalg.vector_norm(output.flatten(1), dim=1))


def test_the_window_and_the_noise_choose_the_steps() -> None:
    table = TABLES["flow_sde"]
    inside = guided_steps(guidance("score", guidance_window=(0.2, 0.9)), table)
    assert inside == [False, True, True, True, True, False]
    assert guided_steps(guidance("mean_shift", guidance_window=(0.0, 1.0)), table) == [
        False, True, True, True, True, False,
    ]  # fmt: skip
    assert not any(guided_steps(guidance("score", weight=0.0), table))


def test_the_proposal_ratio_is_that_of_two_normals() -> None:
    displacement, noise = (tensor.double() for tensor in operands())
    std = 0.4
    mean = torch.zeros_like(noise)
    landed = mean + displacement + std * noise
    expected = torch.distributions.Normal(mean, std).log_prob(landed).flatten(1).sum(dim=1)
    expected -= torch.distributions.Normal(mean + displacement, std).log_prob(landed).flatten(1).sum(dim=1)
    torch.testing.assert_close(log_proposal_ratio(displacement, noise, std), expected)


@pytest.mark.parametrize("form", GUIDANCE_FORMS)
def test_the_limit_of_guidance_is_the_base(form: str) -> None:
    sampler = SamplerConfig(num_steps=6)
    backbone = GaussianBackbone()
    table = backbone.transition_table(sampler)
    backbone.critic = ClosedFormCritic(lambda sample, step: sample.flatten(1).square().sum(dim=1), table)

    def images(weight: float) -> Tensor:
        return steer(backbone, [""] * 16, guidance(form, weight), sampler=sampler)[0]

    base = images(0.0)
    moves = [(images(weight) - base).abs().max() for weight in (1e-2, 1e-3, 1e-4)]
    assert float(moves[0]) > 0
    # Linear in the weight as it vanishes.
    assert moves[1] < 0.15 * moves[0]
    assert moves[2] < 0.15 * moves[1] + 1e-6


def test_the_step_with_guidance_is_the_references_step_plus_the_displacement() -> None:
    """One step of a one-step call, so that nothing else can hide it."""
    sampler = SamplerConfig(num_steps=2, noise_level=0.7)
    backbone = GaussianBackbone()
    table = backbone.transition_table(sampler)
    backbone.critic = ClosedFormCritic(lambda sample, step: 2 * sample.flatten(1)[:, 0], table)
    config = guidance("constant", guidance_window=(0.9, 1.0))
    with pytest.raises(ValueError, match="no step's noise level lies within"):
        steer(backbone, [""], config, sampler=sampler)
    guided = steer(backbone, [""] * 4, guidance("constant"), sampler=sampler)[0]
    base = steer(backbone, [""] * 4, guidance("constant", 0.0), sampler=sampler)[0]
    # The last step, at sigma = 1/2, moves by |b| w g = 1/2 0.3 2.
    torch.testing.assert_close(guided - base, torch.tensor([0.3, 0.0]).view(1, 2, 1, 1).expand(4, -1, -1, -1))
