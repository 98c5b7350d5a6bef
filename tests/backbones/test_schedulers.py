"""A table takes the steps that the scheduler of diffusers takes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from lacfast import reference
from lacfast.backbones.schedulers import from_scheduler

PARITY = {"rtol": 2e-6, "atol": 2e-6}
"""float32 against a differently ordered float32 expression."""


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_ddim_makes_the_step_of_diffusers(prediction_type: str, eta: float, spacing: str) -> None:
    scheduler = DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=prediction_type,
        timestep_spacing=spacing,
    )
    table = from_scheduler(scheduler, 10, "ddim", eta)
    scheduler.set_timesteps(10)
    torch.testing.assert_close(table.timesteps, scheduler.timesteps.float())
    assert_equal_steps(
        scheduler, table, lambda timestep, v, x, eps: {"eta": eta, "variance_noise": eps if eta > 0 else None}
    )


def assert_equal_steps(scheduler: Any, table: Any, arguments: Any) -> None:
    """Our float32 step against the scheduler's in float64: its float32 cancels where the signal is near 1."""
    generator = torch.Generator().manual_seed(1)
    for name in ("alphas_cumprod", "final_alpha_cumprod", "sigmas", "one"):
        if hasattr(scheduler, name):
            setattr(scheduler, name, getattr(scheduler, name).double())
    for step, timestep in enumerate(scheduler.timesteps):
        x, v, eps = (torch.randn((2, 4, 8, 8), generator=generator) for _ in range(3))
        expected = scheduler.step(
            v.double(), timestep, x.double(), **arguments(timestep, v, x, eps.double())
        ).prev_sample
        ours = reference.gaussian_step(
            x, v, table.coefficients(), torch.full((2,), step), noise=eps
        ).prev_sample
        torch.testing.assert_close(ours.double(), expected.double(), **PARITY)


def test_ddim_with_a_final_alpha_of_one_has_no_nan_at_the_last_step() -> None:
    scheduler = DDIMScheduler(clip_sample=False, set_alpha_to_one=True, steps_offset=0)
    table = from_scheduler(scheduler, 10, "ddim", 1.0)
    assert table.coefficients().isfinite().all()
    assert table.trainable_steps == list(range(9))


@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large"])
@pytest.mark.parametrize("spacing", ["leading", "linspace"])
def test_ddpm_makes_the_step_of_diffusers(
    variance_type: str, spacing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler = DDPMScheduler(clip_sample=False, variance_type=variance_type, timestep_spacing=spacing)
    table = from_scheduler(scheduler, 20, "ddpm", 1.0)
    scheduler.set_timesteps(20)
    drawn: dict[str, Tensor] = {}
    # DDPMScheduler.step draws its own noise; it is made to draw the test's.
    monkeypatch.setattr(
        "diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *args, **kwargs: drawn["eps"]
    )

    def arguments(timestep: Tensor, v: Tensor, x: Tensor, eps: Tensor) -> dict[str, Any]:
        drawn["eps"] = eps
        return {}

    assert_equal_steps(scheduler, table, arguments)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_match_ode_makes_the_step_of_diffusers(shift: float) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    table = from_scheduler(scheduler, 10, "ode", 0.0)
    scheduler.set_timesteps(10)
    torch.testing.assert_close(table.timesteps, scheduler.timesteps)
    assert_equal_steps(scheduler, table, lambda *_: {})


def test_from_scheduler_leaves_the_scheduler_as_it_was() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    before = scheduler.sigmas.clone()
    from_scheduler(scheduler, 4, "flow_sde", 0.7, mu=0.9)
    assert torch.equal(scheduler.sigmas, before)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: from_scheduler(DDIMScheduler(), 10, "ddim", 1.0), "clip_sample=True"),
        (
            lambda: from_scheduler(DDPMScheduler(clip_sample=False), 10, "flow_sde", 1.0),
            "cannot run sampler kind 'flow_sde'",
        ),
        (lambda: from_scheduler(object(), 10, "ddim", 1.0), "no transition table for object"),
    ],
)
def test_a_scheduler_without_a_table_is_refused(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
