"""Every sampler kind makes the step that its source makes."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from refusals import Refusal
from torch import Tensor

from lacfast import reference, schedule

PARITY = {"rtol": 2e-6, "atol": 2e-6}
"""float32 against a differently ordered float32 expression."""
NOISE_LEVEL = 0.7
SIGMAS = schedule.uniform_sigmas(10, shift=3.0)
SHAPES = {"image": (4, 16, 8, 8), "packed": (4, 64, 16), "video": (4, 4, 3, 8, 8)}


def published_flow_step(
    kind: str, x: Tensor, v: Tensor, s: Tensor, n: Tensor, s_after_one: Tensor, eps: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(x', mean, std) as the papers write the step: a drift that follows the estimate of the clean latent."""
    clean, noise = x - s * v, x + (1 - s) * v
    h = s - n
    if kind == "cps":
        std = n * math.sin(NOISE_LEVEL * math.pi / 2)
        mean = (1 - n) * clean + (n**2 - std**2).sqrt() * noise
    elif kind == "flow_ddim":
        std = NOISE_LEVEL * n * (1 - (n / (1 - n)) ** 2 * ((1 - s) / s) ** 2).sqrt()
        mean = (1 - n) * clean + (n**2 - std**2).sqrt() * noise
    else:
        divisor = 1 - torch.where(s == 1, s_after_one, s)
        g = NOISE_LEVEL * (s / divisor).sqrt() if kind == "flow_sde" else torch.as_tensor(NOISE_LEVEL).to(s)
        score = -noise / s
        mean = x - h * (v - g**2 / 2 * score)
        std = g * h.sqrt()
    return mean + std * eps, mean, std


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("kind", ["flow_sde", "dance_sde", "cps", "flow_ddim"])
def test_flow_kinds_make_the_published_step_with_mixed_steps_in_a_batch(
    kind: str, shape: tuple[int, ...]
) -> None:
    generator = torch.Generator().manual_seed(0)
    x, v, eps = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(3))
    # cps and flow_ddim end in a deterministic step, so their last stochastic one is tested.
    last = 9 if kind in ("flow_sde", "dance_sde") else 8
    steps = torch.tensor([0, last, 4, 1])
    table = schedule.flow_table(kind, SIGMAS, NOISE_LEVEL)
    result = reference.gaussian_step(x.float(), v.float(), table.coefficients(), steps, noise=eps.float())
    view = (-1,) + (1,) * (len(shape) - 1)
    s, n = SIGMAS[steps].view(view), SIGMAS[steps + 1].view(view)
    prev_sample, mean, std = published_flow_step(kind, x, v, s, n, SIGMAS[1], eps)
    torch.testing.assert_close(result.prev_sample.double(), prev_sample, **PARITY)
    stored = result.prev_sample.double()
    log_prob = (
        (-((stored - mean) ** 2) / (2 * std**2) - std.log() - math.log(math.sqrt(2 * math.pi)))
        .flatten(1)
        .mean(dim=1)
    )
    torch.testing.assert_close(result.log_prob.double(), log_prob, rtol=2e-6, atol=1e-5)


@pytest.mark.parametrize("kind", sorted(schedule.FLOW_KINDS))
def test_a_noise_level_of_zero_is_the_ode_and_has_no_log_prob(kind: str) -> None:
    table = schedule.flow_table(kind, SIGMAS, 0.0)
    assert table.trainable_steps == []
    torch.testing.assert_close(table.b, SIGMAS[1:] - SIGMAS[:-1])
    x = torch.randn(10, 4, 3)
    result = reference.gaussian_step(
        x, x.sin(), table.coefficients(), torch.arange(10), noise=torch.full_like(x, 3.0)
    )
    assert (result.log_prob == 0).all()


@pytest.mark.parametrize("kind", sorted(schedule.FLOW_KINDS))
@pytest.mark.parametrize("level", [0.3, 1.0])
def test_every_row_of_every_kind_is_finite(kind: str, level: float) -> None:
    table = schedule.flow_table(kind, SIGMAS, 0.0 if kind == "ode" else level)
    for column in (table.a, table.b, table.std):
        assert column.isfinite().all()


@pytest.mark.parametrize(("below", "near"), [(1e-6, 1e-4), (1e-3, 0.05)])
def test_a_schedule_that_begins_a_little_below_pure_noise_takes_the_step_of_pure_noise(
    below: float, near: float
) -> None:
    """As solvers' do, where noise_level sqrt(s / (1 - s)) alone would throw the sample away."""
    levels = SIGMAS.clone()
    levels[0] = 1 - below
    table, pure = (schedule.flow_sde(each, NOISE_LEVEL) for each in (levels, SIGMAS))
    for row in ("a", "b", "std"):
        torch.testing.assert_close(getattr(table, row), getattr(pure, row), rtol=0, atol=near)
        assert torch.equal(getattr(table, row)[1:], getattr(pure, row)[1:])


def test_a_window_leaves_ode_steps_outside() -> None:
    table = schedule.flow_sde(SIGMAS, NOISE_LEVEL, window=(2, 5))
    whole, ode = schedule.flow_sde(SIGMAS, NOISE_LEVEL), schedule.ode(SIGMAS)
    assert table.trainable_steps == [2, 3, 4]
    torch.testing.assert_close(table.a[2:5], whole.a[2:5], rtol=0, atol=0)
    torch.testing.assert_close(table.b[5:], ode.b[5:], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("call", "refusal"),
    [
        (
            lambda: schedule.flow_table("euler", SIGMAS, 0.7),
            Refusal(
                "unknown sampler kind 'euler'",
                cause="A sampler of flows that there is not.",
                remedy="flow_sde",
            ),
        ),
        (
            lambda: schedule.flow_sde(SIGMAS.flip(0), 0.7),
            Refusal(
                "sigmas must fall strictly within [0, 1]",
                cause="Noise levels that rise, repeat, or are none.",
                remedy="give the noisiest level first",
            ),
        ),
        (
            lambda: schedule.flow_sde(SIGMAS[:1], 0.7),
            Refusal(
                "sigmas must be a vector of at least 2 noise levels",
                cause="Noise levels of no step.",
                remedy="give that of the start and that after each step",
            ),
        ),
        (
            lambda: schedule.flow_sde(SIGMAS, -1.0),
            Refusal(
                "noise_level=-1.0 of kind='flow_sde'",
                cause="Less than no noise.",
                remedy="must be >= 0",
            ),
        ),
        (
            lambda: schedule.flow_sde(SIGMAS, 0.7, window=(3, 12)),
            Refusal(
                "window=(3, 12) must lie within the 10 steps",
                cause="A window behind the last step.",
                remedy="0 <= start <= stop <= 10",
            ),
        ),
        (
            lambda: schedule.ode(SIGMAS, 0.7),
            Refusal(
                "noise_level=0.7 of kind='ode' must be 0",
                cause="Noise for the sampler without any.",
                remedy="it draws no noise; explore with kind='flow_sde', or 'ddim'",
            ),
        ),
        (
            lambda: schedule.flow_ddim(SIGMAS, 1.5),
            Refusal(
                "noise_level=1.5 of kind='flow_ddim'",
                cause="A variance that is larger than what the step has left.",
                remedy="must lie in [0, 1]",
            ),
        ),
        (
            lambda: schedule.cps(SIGMAS, 2.0),
            Refusal(
                "noise_level=2.0 of kind='cps'",
                cause="A rotation by more than a right angle.",
                remedy="must lie in [0, 1]",
            ),
        ),
        (
            lambda: schedule.flow_sde(SIGMAS, 1e-9),
            Refusal(
                "of 'flow_sde' has std",
                cause="So little noise that a log-prob is made of rounding.",
                remedy="use a larger noise_level, or leave the step out of the window",
            ),
        ),
        (
            lambda: schedule.dance_sde(SIGMAS, math.inf),
            Refusal(
                "noise_level=inf of kind='dance_sde'",
                cause="A noise level that is not finite.",
                remedy="must be >= 0",
            ),
        ),
        (
            lambda: replace(schedule.ode(SIGMAS), std=torch.full((10,), math.nan)),
            Refusal(
                "of 'ode' has (a, b, std) =",
                cause="Coefficients of a step that are not finite.",
                remedy="use a smaller noise_level",
            ),
        ),
    ],
)
def test_bad_input_gets_one_error_with_value_and_remedy(call: Any, refusal: Refusal) -> None:
    with refusal.raised():
        call()


def test_the_name_that_knew_diffusers_says_where_it_is() -> None:
    with pytest.raises(AttributeError, match=r"from_scheduler is in lacfast\.backbones\.schedulers"):
        getattr(schedule, "from_scheduler")  # noqa: B009
