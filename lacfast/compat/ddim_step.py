"""ddpo-pytorch's DDIM step with log-prob: one row per training timestep, so that a step looks nothing up."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DDIMScheduler
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from lacfast import ops, schedule
from lacfast.compat.tables import ScheduleCache, per_sample, require_known, with_unknown_row
from lacfast.ops.checks import arithmetic_dtype

Generators = torch.Generator | list[torch.Generator] | None


@dataclass(frozen=True)
class _StepTables:
    """DDIM for every training timestep: row t, and a last row for unknown timesteps."""

    transition: Tensor
    """(train steps + 1, 3) a, b, std of x' = a x + b v + std eps."""
    signals: Tensor
    """(train steps + 1, 2) sqrt(A), sqrt(1 - A) before the step."""
    parts: Tensor
    """(train steps + 1, 3) k, sqrt(A'), std of x' = k e + sqrt(A') x0 + std eps."""

    def to(self, device: torch.device, dtype: torch.dtype) -> _StepTables:
        return _StepTables(*(tensor.to(device, dtype) for tensor in vars(self).values()))


_tables: ScheduleCache[_StepTables] = ScheduleCache()


def ddim_step_with_logprob(
    self: Any,
    model_output: Tensor,
    timestep: Tensor | int,
    sample: Tensor,
    eta: float = 0.0,
    use_clipped_model_output: bool = False,
    generator: Generators = None,
    prev_sample: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One DDIM step (arXiv 2010.02502, eq. 12 and 16) and its log-prob: ddpo-pytorch's function.

        x' = a x + b v + std eps            (a, b, std) of lacfast.schedule.ddim
        log_prob = mean( -(x' - mu)^2 / (2 std^2) - log std - log(2 pi) / 2 );   0 where std = 0

    Where the scheduler clips or thresholds, mu = k e + sqrt(A') x0 with the clipped x0. Maths in float32.
    After the last step the cumulative alpha is that of training timestep 0, as in the original, not the
    scheduler's final_alpha_cumprod (they are equal where set_alpha_to_one is False, as for SD1.x).
    x' carries gradients to sample and model_output; log_prob takes x' as a constant.

    Args:
        self: the scheduler, by the original's name: DDIMScheduler after `set_timesteps`; read, never changed.
        model_output: (B, ...) the model's prediction, after guidance.
        timestep: (B,) or one for all, integers.
        sample: (B, ...) latents.
        eta: 0 deterministic, 1 DDPM's posterior variance.
        use_clipped_model_output: derive the noise estimate again from the clipped x0.
        generator: draws the noise, of model_output's shape and dtype, as diffusers' randn_tensor does.
        prev_sample: (B, ...) the transition's result, for its log-prob under another model. None: drawn.

    Returns:
        prev_sample (B, ...) in the sample's dtype and log_prob (B,).

    Raises:
        ValueError: both prev_sample and generator, a scheduler without timesteps, or a timestep that the
            scheduler was not trained with (on a GPU the results are NaN then).
    """
    if prev_sample is not None and generator is not None:
        raise ValueError("prev_sample and generator are both given; a given prev_sample draws nothing")
    tables, steps = _look_up(self, timestep, sample, eta)
    noise = None
    if prev_sample is None:
        noise = randn_tensor(
            tuple(model_output.shape),
            generator=generator,
            device=model_output.device,
            dtype=model_output.dtype,
        )
    config = self.config
    if config.thresholding or config.clip_sample or use_clipped_model_output:
        state, output = _clipped_parts(
            self, sample, model_output, tables.signals[steps], use_clipped_model_output
        )
        coefficients = tables.parts
    else:
        state, output, coefficients = sample, model_output, tables.transition
    if noise is not None:
        state, output = _kernel_inputs(state, output, state.dtype)
        drawn = ops.gaussian_step(state, output, coefficients, steps, noise=noise.to(arithmetic_dtype(state)))
        if drawn.prev_sample.dtype == sample.dtype:
            return drawn.prev_sample, drawn.log_prob
        prev_sample = drawn.prev_sample.to(sample.dtype)
    assert prev_sample is not None
    state, output = _kernel_inputs(state, output, torch.promote_types(state.dtype, prev_sample.dtype))
    landed = prev_sample.detach().to(state.dtype).contiguous()
    log_prob = ops.step_log_prob(state, output, landed, coefficients, steps)
    return prev_sample.to(sample.dtype), log_prob


def _kernel_inputs(state: Tensor, output: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Contiguous, the state in `dtype`; half-precision outputs stay unless the maths is in float64."""
    state = state.to(dtype).contiguous()
    if torch.float64 in (state.dtype, output.dtype):
        output = output.to(arithmetic_dtype(state))
    return state, output.contiguous()


def _clipped_parts(
    scheduler: Any, sample: Tensor, model_output: Tensor, signals: Tensor, rederive: bool
) -> tuple[Tensor, Tensor]:
    """Noise estimate and clipped x0 (B, ...) of the model's prediction, in the dtype of the maths."""
    shape = (-1,) + (1,) * (sample.ndim - 1)
    signal, noise = (column.view(shape) for column in signals.unbind(dim=1))
    sample, model_output = sample.to(signals.dtype), model_output.to(signals.dtype)
    kind = scheduler.config.prediction_type
    if kind == "epsilon":
        estimate, clean = model_output, (sample - noise * model_output) / signal
    elif kind == "sample":
        estimate, clean = (sample - signal * model_output) / noise, model_output
    else:
        estimate = signal * model_output + noise * sample
        clean = signal * sample - noise * model_output
    if scheduler.config.thresholding:
        clean = scheduler._threshold_sample(clean)
    elif scheduler.config.clip_sample:
        clean = clean.clamp(-scheduler.config.clip_sample_range, scheduler.config.clip_sample_range)
    return ((sample - signal * clean) / noise if rederive else estimate), clean


def _require_ready(scheduler: object) -> None:
    if not isinstance(scheduler, DDIMScheduler):
        raise ValueError(
            f"{type(scheduler).__name__} is no DDIMScheduler; use "
            "DDIMScheduler.from_config(pipeline.scheduler.config)"
        )
    if getattr(scheduler, "num_inference_steps", None) is None:
        raise ValueError(
            "the scheduler has no inference steps; call scheduler.set_timesteps(num_steps) first"
        )


def _look_up(
    scheduler: Any, timestep: Tensor | float, sample: Tensor, eta: float
) -> tuple[_StepTables, Tensor]:
    """The tables on the sample's device and the row (B,) of each timestep, which is the timestep itself."""
    _require_ready(scheduler)
    settings = (
        scheduler.config.num_train_timesteps // scheduler.num_inference_steps,
        float(eta),
        scheduler.config.prediction_type,
    )
    alphas, place = scheduler.alphas_cumprod, (sample.device, arithmetic_dtype(sample))
    host = _tables.get(alphas, settings, lambda: _build(alphas, *settings))
    tables = _tables.get(alphas, (*settings, *place), lambda: host.to(*place))
    given, count = torch.as_tensor(timestep).reshape(-1), len(tables.signals) - 1
    rows = torch.where((given >= 0) & (given < count) & (given == given.round()), given.long(), count)
    require_known(
        rows,
        count,
        lambda: f"timestep {given.tolist()} is not one of the training timesteps 0 to {count - 1}",
    )
    return tables, per_sample(rows.to(sample.device), len(sample))


def _build(alphas_cumprod: Tensor, spacing: int, eta: float, prediction_type: str) -> _StepTables:
    """The tables in float64 on the host."""
    alphas = alphas_cumprod.detach().to("cpu", torch.float64)
    timesteps = torch.arange(len(alphas)).flip(0)
    previous = (timesteps - spacing).clamp(min=0)
    table = schedule.ddim(
        alphas, timesteps, eta, prediction_type=prediction_type, prev_timesteps=previous
    ).coefficients(dtype=torch.float64)
    signal, prev_signal, std = alphas[timesteps], alphas[previous], table[:, 2]
    direction = (1 - prev_signal - std**2).clamp(min=0).sqrt()
    parts = torch.stack([direction, prev_signal.sqrt(), std], dim=1)
    signals = torch.stack([signal.sqrt(), (1 - signal).sqrt()], dim=1)
    return _StepTables(
        with_unknown_row(table.flip(0)),
        torch.cat([signals.flip(0), signals[:1] * float("nan")]),
        with_unknown_row(parts.flip(0)),
    )
