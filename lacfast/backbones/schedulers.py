"""diffusers' schedulers as transition tables: the same steps, from the scheduler's own numbers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor

from lacfast.backbones.scheduler_choice import (
    NOT_AFFINE,
    OWN_LEVELS,
    is_flow,
    require_ddim_step,
    require_forward_time,
)
from lacfast.config.sampling import require_noise_level
from lacfast.records import TransitionTable
from lacfast.schedule import FLOW_KINDS, Window, ddim, ddim_levels, flow_table


def from_scheduler(
    scheduler: Any,
    num_steps: int,
    kind: str,
    noise_level: float,
    *,
    window: Window | None = None,
    sigmas: Tensor | None = None,
    mu: float | None = None,
) -> TransitionTable:
    """The table that makes the same steps as a diffusers scheduler, which is not modified.

    Args:
        scheduler: FlowMatchEulerDiscreteScheduler, DDIMScheduler or DDPMScheduler; of the solvers in
            OWN_LEVELS the table has the noise levels, under Euler steps or DDIM's.
        num_steps: T.
        kind: a flow kind for FlowMatchEulerDiscrete, "ddim" for DDIM and DDPM, "ddpm" for DDPM with its
            own variance; "ode" for all, which is DDIM without noise.
        noise_level: eta of the kind; for "ddpm" 1.
        window: (start, stop) steps that are stochastic. None: all.
        sigmas: (T,) noise levels before any shift, for a FlowMatchEulerDiscrete. None: its own.
        mu: shift of a FlowMatchEulerDiscrete with dynamic shifting.

    Raises:
        ValueError: for another scheduler, a kind that it cannot run, or settings that are not affine
            (clipping, thresholding).
    """
    name = type(scheduler).__name__
    known: dict[str, tuple[str, ...]] = {
        "FlowMatchEulerDiscreteScheduler": tuple(FLOW_KINDS),
        "DDIMScheduler": ("ddim", "ode"),
        "DDPMScheduler": ("ddim", "ddpm", "ode"),
    }
    known |= dict.fromkeys(OWN_LEVELS, ("ddim", "ode"))
    if name in OWN_LEVELS and is_flow(scheduler):
        known[name] = tuple(FLOW_KINDS)
    if name not in known:
        raise ValueError(f"no transition table for {name}; known schedulers: {', '.join(known)}")
    if kind not in known[name]:
        raise ValueError(f"{name} cannot run sampler kind {kind!r}; known: {', '.join(known[name])}")
    own = type(scheduler).from_config(scheduler.config)
    if is_flow(own):
        return _from_flow_match(own, num_steps, kind, noise_level, window, sigmas, mu)
    for setting in NOT_AFFINE:
        if own.config.get(setting, False):
            raise ValueError(
                f"{setting}=True makes {name}'s step not affine; "
                f"use {name}.from_config(scheduler.config, {setting}=False)"
            )
    require_ddim_step(name, own.config)
    own.set_timesteps(num_steps)
    require_noise_level(kind, noise_level)
    if name in OWN_LEVELS:
        prediction = own.config.prediction_type
        return ddim_levels(own.sigmas, own.timesteps, noise_level, prediction_type=prediction, window=window)
    return _from_ddpm(own, window) if kind == "ddpm" else _from_ddim(own, kind, noise_level, window)


def _from_flow_match(
    scheduler: Any,
    num_steps: int,
    kind: str,
    noise_level: float,
    window: Window | None,
    sigmas: Tensor | None,
    mu: float | None,
) -> TransitionTable:
    require_forward_time(scheduler)
    shift = {} if mu is None else {"mu": mu}
    if sigmas is None:
        scheduler.set_timesteps(num_steps, **shift)
    else:
        scheduler.set_timesteps(sigmas=sigmas.tolist(), **shift)
    table = flow_table(kind, scheduler.sigmas.double(), noise_level, window=window)
    return replace(table, timesteps=scheduler.timesteps.float().cpu())


def _previous_timesteps(scheduler: Any) -> Tensor:
    if hasattr(scheduler, "previous_timestep"):
        return torch.tensor([int(scheduler.previous_timestep(t)) for t in scheduler.timesteps])
    spacing = scheduler.config.num_train_timesteps // scheduler.num_inference_steps
    return cast(Tensor, scheduler.timesteps.cpu().long() - spacing)


def _from_ddim(scheduler: Any, kind: str, eta: float, window: Window | None) -> TransitionTable:
    final = getattr(scheduler, "final_alpha_cumprod", torch.tensor(1.0))
    return ddim(
        scheduler.alphas_cumprod,
        scheduler.timesteps,
        eta,
        prediction_type=scheduler.config.prediction_type,
        final_alpha_cumprod=float(final),
        prev_timesteps=_previous_timesteps(scheduler),
        window=window,
    )


def _from_ddpm(scheduler: Any, window: Window | None) -> TransitionTable:
    """DDPM's posterior is DDIM at eta = 1; only a `fixed_large` variance differs."""
    table = _from_ddim(scheduler, "ddpm", 1.0, window)
    variance_type = scheduler.config.variance_type
    if variance_type in ("fixed_small", "fixed_small_log"):
        return table
    if variance_type != "fixed_large":
        raise ValueError(
            f"variance_type {variance_type!r} is learned or unknown; use 'fixed_small' or 'fixed_large'"
        )
    signal = 1 - table.sigmas**2
    beta = 1 - signal[:-1] / signal[1:]
    std = torch.where(table.std > 0, beta.clamp(min=0).sqrt(), table.std)
    return replace(table, kind="ddpm", std=std)
