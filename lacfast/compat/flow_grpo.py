"""flow_grpo's step function and reward statistics on lacfast's ops.

What is fixed against the originals: a noise level of 0 gives the ODE step with log-prob 0, not NaN; latents
of any rank work, packed (B, L, D) ones too, where the first two versions broadcast them to (B, B, L, D);
a timestep that is not the scheduler's is refused instead of indexed out of range; no host synchronisation
per sample; and PerPromptStatTracker may be updated again before it is cleared.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import UniPCMultistepScheduler
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from lacfast import ops, schedule
from lacfast.compat.ddim_step import Generators
from lacfast.compat.prompt_statistics import GroupStatTracker as PerPromptStatTracker
from lacfast.compat.tables import ScheduleCache, per_sample, require_known, with_unknown_row

__all__ = ["PerPromptStatTracker", "sde_step_with_logprob", "sde_step_with_logprob_v1"]

KINDS = {"sde": "flow_sde", "cps": "cps"}
"""flow_grpo's sde_type -> lacfast.schedule's kind."""


@dataclass(frozen=True)
class _StepTables:
    """A schedule as tables with T rows and one for unknown timesteps."""

    timesteps: Tensor
    """(T,) float32"""
    transition: Tensor
    """(T + 1, 3) float32: a, b, std."""
    drift: Tensor
    """(T + 1, 3) float32: a, b, 0; a step of it is the transition's mean."""
    scales: Tensor
    """(T + 1, 2) float32: the standard deviation in flow_grpo's unit, sqrt(sigma_k - sigma_{k+1})."""

    def to(self, device: torch.device) -> _StepTables:
        return _StepTables(*(tensor.to(device) for tensor in vars(self).values()))


_tables: ScheduleCache[_StepTables] = ScheduleCache()


def sde_step_with_logprob(
    self: Any,
    model_output: Tensor,
    timestep: Tensor | float,
    sample: Tensor,
    noise_level: float | Tensor = 0.7,
    prev_sample: Tensor | None = None,
    generator: Generators = None,
    sde_type: str = "sde",
    return_sqrt_dt: bool = False,
) -> tuple[Tensor, ...]:
    """One stochastic step of a flow model and its log-prob: flow_grpo's function since July 2025.

        x' = a x + b v + std eps            (a, b, std) of lacfast.schedule.flow_sde or .cps
        "sde":  log_prob = mean( -(x' - mu)^2 / (2 std^2) - log std - log(2 pi) / 2 )   Flow-GRPO, eq. 9
        "cps":  log_prob = mean( -(x' - mu)^2 )           as flow_grpo has it, without its constants

    Maths and results in float32. x' (when it is drawn) and mu carry gradients to sample and model_output;
    log_prob takes x' as a constant.

    Args:
        self: the scheduler, by the original's name: FlowMatchEulerDiscreteScheduler after `set_timesteps`;
            read, never changed.
        model_output: (B, ...) predicted velocity.
        timestep: (B,) or one for all: entries of the scheduler's timesteps as they are, or truncated to
            integers where that leaves no doubt.
        sample: (B, ...) latents of any rank.
        noise_level: eta; 0 gives the ODE step, for "cps" at most 1. A tensor of one element, or for "sde"
            (B, 1, ...); the host waits for one on a GPU.
        prev_sample: (B, ...) the transition's result, for its log-prob under another model. None: drawn.
        generator: draws the noise, of model_output's shape, as diffusers' randn_tensor does.
        sde_type: "sde" or "cps".
        return_sqrt_dt: also return sqrt(sigma_k - sigma_{k+1}).

    Returns:
        prev_sample (B, ...), log_prob (B,), mu (B, ...), and the standard deviation (B, 1, ...), one row if
        timestep has one: for "sde" the diffusion g, the transition's is g sqrt(dt); for "cps" the
        transition's own. With return_sqrt_dt a fifth, sqrt(dt) of the same shape.

    Raises:
        ValueError: an unknown sde_type or noise level, a timestep that the scheduler does not have (on a GPU
            the results are NaN then), or the arguments of the first signature.
    """
    sample = sample.float().contiguous()
    levels = _noise_levels(noise_level, sample, sde_type)
    tables, rows = _look_up(self, timestep, sample, sde_type, levels)
    steps = per_sample(rows, len(sample))
    model_output = _kernel_input(model_output)
    mean = _mean(sample, model_output, tables, steps)
    if prev_sample is not None:
        prev_sample = prev_sample.float()
        landed = prev_sample.detach().contiguous()
        if sde_type == "sde":
            log_prob = ops.step_log_prob(sample, model_output, landed, tables.transition, steps)
    else:
        noise = randn_tensor(
            tuple(model_output.shape), generator=generator, device=sample.device, dtype=torch.float32
        )
        result = ops.gaussian_step(sample, model_output, tables.transition, steps, noise=noise)
        prev_sample, log_prob = result.prev_sample, result.log_prob
        landed = prev_sample.detach()
    if sde_type == "cps":
        log_prob = -F.mse_loss(mean, landed, reduction="none").flatten(1).mean(dim=1)
    std_dev, sqrt_dt = _scales(tables, rows, sample)
    if return_sqrt_dt:
        return prev_sample, log_prob, mean, std_dev, sqrt_dt
    return prev_sample, log_prob, mean, std_dev


def sde_step_with_logprob_v1(
    self: Any,
    model_output: Tensor,
    timestep: Tensor | float,
    sample: Tensor,
    prev_sample: Tensor | None = None,
    generator: Generators = None,
    determistic: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """flow_grpo's function as it was until July 2025: noise level 0.7, and the transition's own deviation.

    Args:
        self: the scheduler, by the original's name: FlowMatchEulerDiscreteScheduler after `set_timesteps`;
            read, never changed.
        model_output: (B, ...) predicted velocity.
        timestep: (B,) or one for all: entries of the scheduler's timesteps as they are, or truncated to
            integers where that leaves no doubt.
        sample: (B, ...) latents of any rank.
        prev_sample: (B, ...) the transition's result. None: drawn.
        generator: draws the noise in model_output's dtype.
        determistic: (the original's spelling) land on the ODE step x + (sigma_{k+1} - sigma_k) v, with its
            log-prob under the SDE; noise is drawn all the same, so a generator advances as it did.

    Returns:
        prev_sample (B, ...), log_prob (B,), mu (B, ...) and g sqrt(dt) (B, 1, ...), in float32.

    Raises:
        ValueError: both prev_sample and generator, a timestep that the scheduler does not have, or Wan's
            scheduler, for which flow_grpo had another function of this name.
    """
    if isinstance(self, UniPCMultistepScheduler):
        raise ValueError(
            "sde_step_with_logprob_v1 is the function for SD3 and FLUX; that for Wan with a "
            "UniPCMultistepScheduler has other noise and is not here: keep importing it from "
            "flow_grpo.diffusers_patch.wan_pipeline_with_logprob"
        )
    if prev_sample is not None and generator is not None:
        raise ValueError("prev_sample and generator are both given; a given prev_sample draws nothing")
    sample = sample.float().contiguous()
    tables, rows = _look_up(self, timestep, sample, "sde", (0.7,))
    steps = per_sample(rows, len(sample))
    noise = None
    if prev_sample is None:
        noise = randn_tensor(
            tuple(model_output.shape), generator=generator, device=sample.device, dtype=model_output.dtype
        ).float()
    model_output = _kernel_input(model_output)
    mean = _mean(sample, model_output, tables, steps)
    std_dev, sqrt_dt = _scales(tables, rows, sample)
    if determistic:
        prev_sample = sample - sqrt_dt**2 * model_output
    if prev_sample is None and noise is not None:
        result = ops.gaussian_step(sample, model_output, tables.transition, steps, noise=noise)
        return result.prev_sample, result.log_prob, mean, std_dev * sqrt_dt
    assert prev_sample is not None
    prev_sample = prev_sample.float()
    landed = prev_sample.detach().contiguous()
    log_prob = ops.step_log_prob(sample, model_output, landed, tables.transition, steps)
    return prev_sample, log_prob, mean, std_dev * sqrt_dt


def _noise_levels(noise_level: object, sample: Tensor, sde_type: str) -> tuple[float, ...]:
    """One for all samples, or one for each."""
    if isinstance(noise_level, Real):
        return (float(noise_level),)
    first_signature = (
        "the first signature had prev_sample in its place: pass prev_sample=..., or import "
        "sde_step_with_logprob_v1"
    )
    per_sample_shape = (len(sample),) + (1,) * (sample.ndim - 1)
    if not isinstance(noise_level, Tensor):
        raise ValueError(f"noise_level is a {type(noise_level).__name__}; {first_signature}")
    if noise_level.numel() == 1:
        return (float(noise_level),)
    if noise_level.shape != per_sample_shape or sde_type != "sde":
        raise ValueError(
            f"noise_level of shape {tuple(noise_level.shape)} is neither a number nor, for 'sde', one per "
            f"sample of shape {per_sample_shape}; {first_signature}"
        )
    return tuple(noise_level.flatten().tolist())


def _kernel_input(model_output: Tensor) -> Tensor:
    """Contiguous; half precision stays as it is, since the kernels compute in float32 anyway."""
    return (model_output.float() if model_output.dtype == torch.float64 else model_output).contiguous()


def _mean(sample: Tensor, model_output: Tensor, tables: _StepTables, steps: Tensor) -> Tensor:
    """a x + b v in one pass, with gradients: the step whose std is 0 reads no noise."""
    return ops.gaussian_step(sample, model_output, tables.drift, steps, noise=sample.detach()).prev_sample


def _scales(tables: _StepTables, rows: Tensor, sample: Tensor) -> tuple[Tensor, Tensor]:
    """flow_grpo's deviation and sqrt(dt), each (len(rows), 1, ...)."""
    shape = (-1,) + (1,) * (sample.ndim - 1)
    std_dev, sqrt_dt = tables.scales[rows].unbind(dim=1)
    return std_dev.view(shape), sqrt_dt.view(shape)


def _look_up(
    scheduler: Any, timestep: Tensor | float, sample: Tensor, sde_type: str, levels: tuple[float, ...]
) -> tuple[_StepTables, Tensor]:
    """The schedule's tables on the sample's device and the row of each timestep, or of each sample.

    Where samples have noise levels of their own, the tables of the levels stand below one another.
    """
    if sde_type not in KINDS:
        raise ValueError(f"unknown sde_type {sde_type!r}; known: {', '.join(map(repr, KINDS))}")
    distinct = tuple(sorted(set(levels)))
    if sde_type == "cps" and not 0 <= distinct[0] <= 1:
        raise ValueError(f"noise_level={distinct[0]} of 'cps' must lie in [0, 1]")

    host = _tables.get(
        scheduler.sigmas,
        (sde_type, distinct),
        lambda: _stacked([_build(scheduler, KINDS[sde_type], level) for level in distinct]),
    )

    def tables_on(device: torch.device) -> _StepTables:
        return _tables.get(scheduler.sigmas, (sde_type, distinct, device), lambda: host.to(device))

    timesteps = torch.as_tensor(timestep).reshape(-1)
    known = tables_on(timesteps.device).timesteps
    # int64 holds the integers of pipelines that truncate; two steps of one integer fit neither.
    comparable = known if timesteps.is_floating_point() else known.trunc()
    matches = timesteps.to(torch.float32)[:, None] == comparable
    rows = torch.where(matches.sum(dim=1) == 1, matches.int().argmax(dim=1), len(known))
    require_known(
        rows,
        len(known),
        lambda: (
            f"timestep {timesteps.tolist()} is not among the scheduler's {known.tolist()}; pass entries of "
            "scheduler.timesteps as they are, neither rounded nor in half precision"
        ),
    )
    rows = rows.to(sample.device)
    if len(distinct) > 1:
        blocks = torch.tensor([distinct.index(level) for level in levels], device=sample.device)
        rows = per_sample(rows, len(sample)) + blocks * (len(known) + 1)
    return tables_on(sample.device), rows


def _stacked(tables: list[_StepTables]) -> _StepTables:
    parts = ([table.transition for table in tables], [table.drift for table in tables])
    scales = torch.cat([table.scales for table in tables])
    return _StepTables(tables[0].timesteps, torch.cat(parts[0]), torch.cat(parts[1]), scales)


def _build(scheduler: Any, kind: str, noise_level: float) -> _StepTables:
    sigmas = scheduler.sigmas.detach().to("cpu", torch.float64)
    timesteps = scheduler.timesteps.detach().to("cpu", torch.float32)
    if len(sigmas) != len(timesteps) + 1:
        raise ValueError(
            f"the scheduler has {len(sigmas)} sigmas for {len(timesteps)} timesteps; call set_timesteps first"
        )
    rows = schedule.flow_table(kind, sigmas, noise_level).coefficients(dtype=torch.float64)
    sqrt_dt = (sigmas[:-1] - sigmas[1:]).sqrt()
    std_dev = rows[:, 2] / sqrt_dt if kind == "flow_sde" else rows[:, 2]
    transition = with_unknown_row(rows)
    drift = transition * torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64)
    scales = torch.stack([std_dev, sqrt_dt], dim=1)
    scales = torch.cat([scales, torch.full((1, 2), math.nan, dtype=torch.float64)])
    return _StepTables(timesteps, transition.float(), drift.float(), scales.float())
