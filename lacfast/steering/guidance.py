"""Guidance by the value gradient g = grad_x V: how far, and when, a step's mean moves along it.

All forms move the mean of x' = a x + b v + std eps by d, so that the step itself stays what it is:
    score:       d = b w c g,  the score becomes score + w g (classifier guidance, arXiv 2105.05233, alg. 2);
                 c is the change of the output per unit of score:
                 epsilon -s;  v -s / sqrt(1 - s^2);  sample s^2 / sqrt(1 - s^2);  flow -s / (1 - s)
    constant:    d = |b| w g                    (arXiv 2605.27736 for a flow)
    mean_shift:  d = w std^2 g                  (the drift of optimal control, w = 1 / tau)
    relative:    d = |b| w |v| g / |g|          (ours: a fraction of the step's own drift)
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from lacfast.config import SteeringConfig
from lacfast.config.checks import unknown
from lacfast.records import TransitionTable

SIGN_TEST_MOVE = 0.01
"""Length of the sign test's move, as a fraction of the latent's."""
SIGN_TEST_STATES = 32
"""Most states that the sign test tries."""


def guided_steps(config: SteeringConfig, table: TransitionTable) -> list[bool]:
    """Whether each step takes a gradient: within the window, and where the form and the method can use it.

    A mean shift moves stochastic steps only, and smc corrects its weights for moves of those only.
    """
    low, high = config.guidance_window
    only_stochastic = config.guidance_form == "mean_shift" or config.method == "smc"
    return [
        config.guided and low < sigma < high and (std > 0 or not only_stochastic)
        for sigma, std in zip(table.sigmas.tolist(), table.std.tolist(), strict=False)
    ]


def output_per_score(prediction_type: str, sigma: float) -> float:
    """c: change of the model output per unit of score at noise level `sigma`; see the equations above.

    Raises:
        ValueError: for an unknown prediction type.
    """
    signal = math.sqrt(1 - sigma**2)
    known = {"flow", "epsilon", "v_prediction", "sample"}
    if prediction_type not in known:
        raise unknown("prediction_type", prediction_type, sorted(known))
    if prediction_type == "flow":
        return -sigma / (1 - sigma)
    if prediction_type == "epsilon":
        return -sigma
    return -sigma / signal if prediction_type == "v_prediction" else sigma**2 / signal


def mean_displacement(
    gradient: Tensor, output: Tensor, config: SteeringConfig, table: TransitionTable, step: int
) -> Tensor:
    """d (B, ...) by which the step's mean moves.

    Args:
        gradient: (B, ...) of V with respect to the latents.
        output: (B, ...) model output that the step uses.
        config: form and weight.
        table: the sampler.
        step: row of the table.
    """
    weight, b, std = config.guidance_weight, float(table.b[step]), float(table.std[step])
    if config.guidance_form == "relative":
        return abs(b) * weight * per_sample_norm(output) * gradient / per_sample_norm(gradient)
    if config.guidance_form == "score":
        return b * weight * output_per_score(table.prediction_type, float(table.sigmas[step])) * gradient
    return (abs(b) if config.guidance_form == "constant" else std**2) * weight * gradient


def log_proposal_ratio(displacement: Tensor, noise: Tensor, std: float) -> Tensor:
    """log p / q (B,) float64 of x' = mu + d + std eps under p = N(mu, std^2) and q = N(mu + d, std^2).

        log p - log q = -sum( d eps / std + d^2 / (2 std^2) )

    Args:
        displacement: d (B, ...).
        noise: eps (B, ...) that was drawn.
        std: of the transition, > 0.
    """
    moved = (displacement.double() / std).flatten(1)
    return -(moved * noise.double().flatten(1) + moved**2 / 2).sum(dim=1)


def sign_test(
    sample: Tensor, gradient: Tensor, values: Tensor, value_of: Callable[[Tensor], Tensor]
) -> float:
    """Mean rise of V when latents move by SIGN_TEST_MOVE of their length along its gradient.

    Args:
        sample: (B, ...) latents.
        gradient: (B, ...) there.
        values: (B,) there.
        value_of: V (B,) of other latents in the same places.

    Raises:
        ValueError: when it does not rise, for then the gradient is not one of this value function.
    """
    move = SIGN_TEST_MOVE * per_sample_norm(sample) * gradient / per_sample_norm(gradient)
    gain = float((value_of(sample + move) - values).mean())
    if not gain > 0:
        raise ValueError(
            f"V changed by {gain:.3g} along its own gradient, so it cannot guide; "
            "train the critic longer or use guidance_weight=0"
        )
    return gain


def per_sample_norm(tensor: Tensor) -> Tensor:
    """(B, 1, ...)"""
    norm: Tensor = torch.linalg.vector_norm(tensor.flatten(1), dim=1).clamp(min=1e-12)
    return norm.view(-1, *(1,) * (tensor.ndim - 1))
