"""What becomes of a pipeline's scheduler: it stays, becomes DDIM on its own noise levels, or is refused.

A sampler here draws the noise itself and steps by a table, so a scheduler gives noise levels only. Those of
an epsilon or v model are read as DDIM, whose step is affine at every eta; those of a flow model as they are.
"""

from __future__ import annotations

import inspect
import warnings
from typing import Any

import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

DDIM_ALREADY = ("DDIMScheduler", "DDIMParallelScheduler")
"""Schedulers whose steps are the table's."""
BECOME_DDIM = (
    "DDPMParallelScheduler",
    "DDPMScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSDEScheduler",
    "DPMSolverSinglestepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
    "SASolverScheduler",
    "UniPCMultistepScheduler",
)
"""Other solvers of models that were trained on DDIM's noise."""
DISTILLED = ("LCMScheduler", "TCDScheduler", "FlowMatchLCMScheduler")
"""Samplers of models that were distilled to their steps."""
NOT_AFFINE = ("clip_sample", "thresholding")
"""Switches of a step that is not affine in sample and model output."""
OTHER_LEVELS = (
    "use_karras_sigmas",
    "use_exponential_sigmas",
    "use_beta_sigmas",
    "use_lu_lambdas",
    "use_flow_sigmas",
    "sigma_min",
    "sigma_max",
)
"""Settings that move noise levels to where DDIM has none."""
OWN_LEVELS = (
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "LMSDiscreteScheduler",
    "SASolverScheduler",
    "UniPCMultistepScheduler",
)
"""Solvers that tell a noise level per step and the last one, wherever their settings put them."""
TRIED_STEPS = (7, 10, 23)
"""Numbers of steps by which the levels of two schedulers are compared."""


def is_flow(scheduler: Any) -> bool:
    """Whether a scheduler that was chosen here has a flow's noise levels; None is flow matching."""
    if scheduler is None or "FlowMatch" in type(scheduler).__name__:
        return True
    return bool(own_settings(scheduler).get("use_flow_sigmas", False))


def ddim_scheduler(scheduler: Any) -> Any:
    """DDIM on the noise levels of an epsilon or v model's scheduler; flow matching stays itself.

    A solver whose levels DDIM does not have is kept, and its levels are read. Warns once where the pipeline's
    own call would step otherwise.

    Raises:
        ValueError: for a scheduler whose noise levels no sampler here has.
    """
    name = type(scheduler).__name__
    if name == "FlowMatchEulerDiscreteScheduler":
        return flow_scheduler(scheduler)
    if name not in (*DDIM_ALREADY, *BECOME_DDIM):
        raise ValueError(
            _refusal(name, "pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)")
        )
    own = own_settings(scheduler)
    _refuse(name, {setting: False for setting in NOT_AFFINE if own.get(setting)})
    moved = [setting for setting in OTHER_LEVELS if own.get(setting)]
    _refuse(name, dict.fromkeys(moved if name not in OWN_LEVELS else {"use_flow_sigmas"} & {*moved}))
    _refuse(name, {"timestep_type": "discrete"} if own.get("timestep_type") == "continuous" else {})
    require_ddim_step(name, scheduler.config)
    # diffusers takes no setting over that its class has by default, and schedulers without a clip would get
    # DDIM's default, which clips latents to [-1, 1].
    told = {key: own[key] for key in ("timestep_spacing", "steps_offset") if key in own}
    chosen = DDIMScheduler.from_config(  # type: ignore[no-untyped-call]
        scheduler.config, **told, clip_sample=False
    )
    place = "on the same training noise"
    if name in OWN_LEVELS and not _has_levels(scheduler, chosen):
        chosen, place = type(scheduler).from_config(scheduler.config), "on its own noise levels"
    if name in BECOME_DDIM:
        warnings.warn(
            f"{name} becomes DDIM {place}: noise_level is its eta, and the pipeline's own "
            "call may show other images. Give the pipeline a DDIMScheduler to see the same ones",
            stacklevel=2,
        )
    return chosen


def _has_levels(scheduler: Any, ddim: Any) -> bool:
    """Whether DDIM has a solver's timesteps and noise levels, with every number of TRIED_STEPS."""
    # KDPM2 makes a table of all training steps whenever one is built.
    own, ddim = type(scheduler).from_config(scheduler.config), type(ddim).from_config(ddim.config)
    for steps in TRIED_STEPS:
        own.set_timesteps(steps)
        ddim.set_timesteps(steps)
        if not torch.equal(own.timesteps.double(), ddim.timesteps.double()):
            return False
        signal = torch.cat([ddim.alphas_cumprod[ddim.timesteps], ddim.final_alpha_cumprod.view(1)])
        levels = own.sigmas / (1 + own.sigmas**2).sqrt()
        if not torch.allclose(levels, (1 - signal).sqrt(), rtol=0, atol=1e-6):
            return False
    return True


def flow_scheduler(scheduler: Any) -> Any:
    """A flow's scheduler as it is: its noise levels under Euler steps.

    Warns where the pipeline's own call would step otherwise.

    Raises:
        ValueError: for a solver that does not tell its levels, or steps that draw their own noise.
    """
    name = type(scheduler).__name__
    own = own_settings(scheduler)
    # The others take no last step to the picture.
    if own.get("use_flow_sigmas", False) and own.get("final_sigmas_type") == "zero" and name in OWN_LEVELS:
        warnings.warn(
            f"{name}'s noise levels are kept and its steps become Euler's: the pipeline's own call may show "
            "other images. Give the pipeline a FlowMatchEulerDiscreteScheduler to see the same ones",
            stacklevel=2,
        )
        return type(scheduler).from_config(scheduler.config)
    if name != "FlowMatchEulerDiscreteScheduler":
        shift = scheduler.config.get("flow_shift", scheduler.config.get("shift", 1.0))
        raise ValueError(
            _refusal(name, f"pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift={shift})")
        )
    if scheduler.config.get("stochastic_sampling", False):
        raise ValueError(
            f"{name} with stochastic_sampling=True draws noise in its own way, which has no log-prob; set "
            "stochastic_sampling=False in its config and explore by SamplerConfig(kind=..., noise_level=...)"
        )
    require_forward_time(scheduler)
    return FlowMatchEulerDiscreteScheduler.from_config(scheduler.config)  # type: ignore[no-untyped-call]


def own_settings(scheduler: Any) -> dict[str, Any]:
    """The settings that a scheduler's class has; diffusers keeps those of other classes beside them."""
    known = inspect.signature(type(scheduler).__init__).parameters
    return {name: value for name, value in scheduler.config.items() if name in known}


def require_ddim_step(name: str, config: Any) -> None:
    """
    Args:
        name: the scheduler's class.
        config: its settings.

    Raises:
        ValueError: when DDIM's step is singular or needs an output that the model does not have.
    """
    prediction = config.get("prediction_type", "epsilon")
    if prediction not in ("epsilon", "v_prediction", "sample"):
        raise ValueError(
            f"{name} of prediction_type={prediction!r} has no DDIM step; known: epsilon, v_prediction, "
            "sample. A model of a flow takes FlowMatchEulerDiscreteScheduler"
        )
    if config.get("rescale_betas_zero_snr", False) and prediction == "epsilon":
        raise ValueError(
            f"{name} with rescale_betas_zero_snr=True starts from noise without signal, where a step from "
            f"epsilon divides by 0; use {name}.from_config(scheduler.config, rescale_betas_zero_snr=False), "
            "or a model that predicts v"
        )
    if str(config.get("variance_type") or "").startswith("learned"):
        raise ValueError(
            f"{name} with variance_type={config['variance_type']!r} wants a model that predicts its "
            "variance; use a model of a fixed variance"
        )


def require_forward_time(scheduler: Any) -> None:
    """
    Raises:
        ValueError: for a flow scheduler whose noise rises.
    """
    if scheduler.config.get("invert_sigmas", False):
        raise ValueError(
            "invert_sigmas=True runs time backwards; set invert_sigmas=False in the scheduler's config"
        )


def _refuse(name: str, changes: dict[str, Any]) -> None:
    if changes:
        settings = ", ".join(f"{setting}={value}" for setting, value in changes.items())
        raise ValueError(
            f"{name} with {' and '.join(changes)} takes steps that DDIM does not have; use "
            f"pipeline.scheduler = {name}.from_config(pipeline.scheduler.config, {settings})"
        )


def _refusal(name: str, remedy: str) -> str:
    if name in DISTILLED:
        return (
            f"{name} samples a model that was distilled to its steps, which no sampler here makes; "
            "load the model from before the distillation, without its LoRA"
        )
    if name.startswith("EDM") or name == "CosineDPMSolverMultistepScheduler":
        return (
            f"{name} samples a model with EDM's preconditioning, whose output is no epsilon, v or flow; "
            "train a model of another scheduler"
        )
    return (
        f"{name} has noise levels or steps that no sampler here makes; if the model allows it, set {remedy}"
    )
