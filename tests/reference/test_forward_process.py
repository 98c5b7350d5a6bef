"""Losses on the forward process: the papers' formulas in float64, and the direction in which they push."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from lacfast import reference, schedule
from lacfast.records import TransitionTable

SHAPE = (5, 3, 4, 4)
SIGMAS = torch.tensor([1.0, 0.8, 0.5, 0.2, 0.0]).double()
STEPS = torch.tensor([0, 1, 2, 3, 2])
WEIGHTS = torch.tensor([1.0, -1.0, 0.3, -0.4, 0.0]).double()


def table(prediction_type: str) -> TransitionTable:
    if prediction_type == "flow":
        return schedule.ode(SIGMAS)
    alphas = torch.linspace(0.999, 0.01, 1000).double()
    timesteps = torch.tensor([900, 600, 300, 50])
    return schedule.ddim(alphas, timesteps, 0.0, prediction_type=prediction_type)


def drawn(count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(SHAPE, generator=generator, dtype=torch.float64) for _ in range(count)]


def clean_estimate(prediction_type: str, x: Tensor, v: Tensor, sigma: float, signal: float) -> Tensor:
    """What a model that predicts v of x says of the clean latent."""
    return {
        "flow": lambda: x - sigma * v,
        "epsilon": lambda: (x - sigma * v) / signal,
        "v_prediction": lambda: signal * x - sigma * v,
        "sample": lambda: v,
    }[prediction_type]()


def levels(prediction_type: str) -> list[tuple[float, float]]:
    """(signal, noise) before each step."""
    noise = table(prediction_type).sigmas[:-1].tolist()
    if prediction_type == "flow":
        return [(1 - level, level) for level in noise]
    return [(math.sqrt(1 - level**2), level) for level in noise]


@pytest.mark.parametrize("prediction_type", ["flow", "epsilon", "v_prediction", "sample"])
def test_nft_is_the_paper_s_loss_on_clean_latents_whatever_a_model_predicts(prediction_type: str) -> None:
    beta, bound = 0.3, 5.0
    clean, eps, output, old = drawn(4)
    rows = schedule.forward_rows(table(prediction_type))
    x, target = reference.noised(clean, eps, rows, STEPS)
    found = bound * reference.nft_losses(output, old, target, WEIGHTS, rows[STEPS, 4], beta=beta)
    for row, step in enumerate(STEPS.tolist()):
        signal, sigma = levels(prediction_type)[step]
        torch.testing.assert_close(x[row], signal * clean[row] + sigma * eps[row])
        r = 0.5 * (1 + float(WEIGHTS[row]))
        terms = []
        for v in (
            beta * output[row] + (1 - beta) * old[row],
            (1 + beta) * old[row] - beta * output[row],
        ):
            error = clean_estimate(prediction_type, x[row], v, sigma, signal) - clean[row]
            terms.append(float(error.square().mean() / error.abs().mean()))
        expected = bound * (r * terms[0] + (1 - r) * terms[1]) / beta
        assert float(found[row]) == pytest.approx(expected, rel=1e-9)


def test_awm_is_the_script_s_weighted_matching_loss() -> None:
    power = 0.25
    clean, eps, output = drawn(3)
    rows = schedule.forward_rows(table("flow"))
    _, target = reference.noised(clean, eps, rows, STEPS)
    found = reference.awm_losses(output, target, WEIGHTS, rows[STEPS, 1], power=power)
    for row, step in enumerate(STEPS.tolist()):
        square = float((output[row] - (eps[row] - clean[row])).square().mean())
        log_prob = -((square + 1e-10) ** power - 1e-10**power) * float(SIGMAS[step]) / power
        assert float(found[row]) == pytest.approx(-float(WEIGHTS[row]) * log_prob, rel=1e-9)


def test_the_power_1_is_the_pretraining_s_loss() -> None:
    clean, eps, output = drawn(3)
    rows = schedule.forward_rows(table("epsilon"))
    _, target = reference.noised(clean, eps, rows, STEPS)
    ones = torch.ones(len(STEPS)).double()
    found = reference.awm_losses(output, target, ones, ones, power=1.0)
    torch.testing.assert_close(found, (output - eps).square().mean(dim=(1, 2, 3)))


def losses(kind: str, output: Tensor, old: Tensor, target: Tensor, weights: Tensor) -> Tensor:
    ones = torch.ones(len(weights)).double()
    if kind == "nft":
        return reference.nft_losses(output, old, target, weights, ones, beta=0.5)
    return reference.awm_losses(output, target, weights, ones, power=0.25)


@pytest.mark.parametrize("kind", ["nft", "awm"])
def test_a_good_image_pulls_and_a_bad_one_pushes(kind: str) -> None:
    old, target = drawn(2)
    output = old.clone().requires_grad_()
    weights = torch.tensor([1.0, 0.5, 0.0, -0.5, -1.0]).double()
    losses(kind, output, old, target, weights).sum().backward()
    assert output.grad is not None
    # Towards the target is where the loss of a good image falls.
    towards = (-output.grad * (target - old)).sum(dim=(1, 2, 3))
    assert (towards[:2] > 0).all()
    assert (towards[3:] < 0).all()
    torch.testing.assert_close(output.grad[2], torch.zeros(SHAPE[1:]).double())
    assert float(towards[0]) > float(towards[1])


def test_half_precision_is_computed_in_float32() -> None:
    clean, eps, output, old = (each.bfloat16() for each in drawn(4))
    rows = schedule.forward_rows(table("flow"))
    x, target = reference.noised(clean, eps, rows, STEPS)
    found = reference.nft_losses(output, old, target, WEIGHTS, rows[STEPS, 4], beta=1.0)
    assert {x.dtype, target.dtype, found.dtype} == {torch.float32}


def test_an_unknown_prediction_is_refused() -> None:
    changed: Any = table("flow")
    object.__setattr__(changed, "prediction_type", "score")
    with pytest.raises(ValueError, match="unknown prediction_type 'score'; known: flow, epsilon"):
        schedule.forward_rows(changed)
