"""Every scheduler of diffusers is right, becomes DDIM and says so, or is refused by its name."""

from __future__ import annotations

import inspect
import warnings
from typing import Any

import diffusers
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
from refusals import Refusal
from tiny_pipelines import PROMPTS, backbone_of, ode_images, own_call, sd_noise, tiny_pipeline, unet

from lacfast import SamplerConfig
from lacfast.backbones.scheduler_choice import BECOME_DDIM, DDIM_ALREADY, ddim_scheduler, flow_scheduler
from lacfast.backbones.schedulers import from_scheduler

CLASSES = sorted(name for name in dir(diffusers) if name.endswith("Scheduler"))
FLOW = "FlowMatchEulerDiscreteScheduler"


def scheduler_of(name: str) -> Any:
    """With the noise of SD 1.x where the class takes it; a stand-in where it cannot be made here."""
    kind = getattr(diffusers, name)
    known = inspect.signature(kind.__init__).parameters
    settings = sd_noise(clip_sample=False, num_train_timesteps=100)
    try:
        return kind(**{key: value for key, value in settings.items() if key in known})
    except (ImportError, TypeError, ValueError):
        # An optional package is missing, or it is no scheduler of images.
        return stand_in(name)


def stand_in(name: str) -> Any:
    """What has the name of a scheduler and any config."""
    return type(name, (), {"config": EulerDiscreteScheduler(**sd_noise()).config})()


@pytest.mark.parametrize("name", CLASSES)
def test_an_epsilon_model_s_scheduler_is_ddim_becomes_ddim_or_is_refused(name: str) -> None:
    scheduler = scheduler_of(name)
    if name not in (*DDIM_ALREADY, *BECOME_DDIM, FLOW):
        with pytest.raises(ValueError, match=f"^{name} "):
            ddim_scheduler(scheduler)
        return
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        chosen = ddim_scheduler(scheduler)
    told = [str(warning.message) for warning in caught if "becomes DDIM" in str(warning.message)]
    assert len(told) == (name in BECOME_DDIM)
    assert all(message.startswith(f"{name} ") for message in told)
    table = from_scheduler(chosen, 10, "ode", 0.0)
    if name == FLOW:
        assert type(chosen).__name__ == FLOW
    elif hasattr(scheduler, "alphas_cumprod"):
        noise = (1 - scheduler.alphas_cumprod[table.timesteps.long()].double()).sqrt()
        assert torch.equal(table.sigmas[:-1], noise)


@pytest.mark.parametrize("name", CLASSES)
def test_a_flow_model_s_scheduler_is_euler_s_or_is_refused(name: str) -> None:
    if name == FLOW:
        scheduler = FlowMatchEulerDiscreteScheduler(shift=2.0)
        assert flow_scheduler(scheduler).config == scheduler.config
    else:
        with pytest.raises(ValueError, match=f"^{name} "):
            flow_scheduler(stand_in(name))


@pytest.mark.parametrize("name", ["DDIMScheduler", "DDIMParallelScheduler"])
def test_ddim_s_classes_give_the_pipeline_s_own_images(name: str) -> None:
    pipeline = tiny_pipeline("sd15")
    pipeline.scheduler = scheduler_of(name)
    latents, images = ode_images(backbone_of(pipeline), PROMPTS[:2], 3.0)
    expected = own_call(pipeline, PROMPTS[:2], latents.clone(), 3.0)
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-4)


def test_a_flow_scheduler_s_spacing_gives_the_pipeline_s_own_images() -> None:
    pipeline = tiny_pipeline("sd3")
    for settings in (
        {"use_karras_sigmas": True},
        {"use_exponential_sigmas": True},
        {"use_beta_sigmas": True},
        {"shift_terminal": 0.1},
        {"use_dynamic_shifting": True, "time_shift_type": "linear"},
    ):
        pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, **settings)
        latents, images = ode_images(backbone_of(pipeline), PROMPTS[:1], 1.0)
        expected = own_call(pipeline, PROMPTS[:1], latents.clone(), 1.0)
        torch.testing.assert_close(images, expected, rtol=0, atol=1e-4, msg=str(settings))


@pytest.mark.parametrize(
    ("scheduler", "refusal"),
    [
        (
            DDIMScheduler(**sd_noise(clip_sample=True)),
            Refusal(
                "DDIMScheduler with clip_sample takes steps that DDIM does not have",
                cause="The pipeline's scheduler clips or thresholds its estimate of the clean sample.",
                remedy="DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)",
            ),
        ),
        (
            DPMSolverMultistepScheduler(**sd_noise(use_karras_sigmas=True)),
            Refusal(
                "DPMSolverMultistepScheduler with use_karras_sigmas takes steps that DDIM does not have",
                cause="The pipeline's scheduler has noise levels between those of the training.",
                remedy="DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config, "
                "use_karras_sigmas=None)",
            ),
        ),
        (
            UniPCMultistepScheduler(prediction_type="flow_prediction"),
            Refusal(
                "UniPCMultistepScheduler of prediction_type='flow_prediction' has no DDIM step",
                cause="A pipeline of epsilon models got the scheduler of a flow.",
                remedy="A model of a flow takes FlowMatchEulerDiscreteScheduler",
            ),
        ),
        (
            EulerDiscreteScheduler(**sd_noise(rescale_betas_zero_snr=True)),
            Refusal(
                "EulerDiscreteScheduler with rescale_betas_zero_snr=True starts from noise without signal",
                cause="An epsilon model's scheduler has zero terminal SNR.",
                remedy="or a model that predicts v",
            ),
        ),
        (
            DDPMScheduler(clip_sample=False, variance_type="learned_range"),
            Refusal(
                "DDPMScheduler with variance_type='learned_range' wants a model that predicts its variance",
                cause="The scheduler's model gives a variance beside its prediction.",
                remedy="use a model of a fixed variance",
            ),
        ),
        (
            scheduler_of("EDMEulerScheduler"),
            Refusal(
                "EDMEulerScheduler samples a model with EDM's preconditioning",
                cause="The pipeline's model was trained for EDM.",
                remedy="train a model of another scheduler",
            ),
        ),
        (
            scheduler_of("LCMScheduler"),
            Refusal(
                "LCMScheduler samples a model that was distilled to its steps",
                cause="The pipeline is LCM's or TCD's.",
                remedy="load the model from before the distillation",
            ),
        ),
        (
            scheduler_of("IPNDMScheduler"),
            Refusal(
                "IPNDMScheduler has noise levels or steps that no sampler here makes",
                cause="The pipeline's scheduler is of another family.",
                remedy="pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)",
            ),
        ),
    ],
)
def test_other_noise_levels_are_refused_at_load(scheduler: Any, refusal: Refusal) -> None:
    pipeline = tiny_pipeline("sdxl")
    pipeline.scheduler = scheduler
    with refusal.raised():
        backbone_of(pipeline)


@pytest.mark.parametrize(
    ("scheduler", "refusal"),
    [
        (
            UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=2.5),
            Refusal(
                "UniPCMultistepScheduler has noise levels or steps that no sampler here makes",
                cause="A flow model's pipeline has another solver, whose flow_shift spaces its noise levels.",
                remedy="pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift=2.5)",
            ),
        ),
        (
            FlowMatchEulerDiscreteScheduler(stochastic_sampling=True),
            Refusal(
                "FlowMatchEulerDiscreteScheduler with stochastic_sampling=True draws noise in its own way",
                cause="A flow model's scheduler is stochastic by itself.",
                remedy="set stochastic_sampling=False in its config",
            ),
        ),
        (
            FlowMatchEulerDiscreteScheduler(invert_sigmas=True),
            Refusal(
                "invert_sigmas=True runs time backwards",
                cause="A flow model's scheduler has rising noise.",
                remedy="set invert_sigmas=False in the scheduler's config",
            ),
        ),
    ],
)
def test_another_solver_of_a_flow_is_refused_at_load(scheduler: Any, refusal: Refusal) -> None:
    pipeline = tiny_pipeline("sd3")
    pipeline.scheduler = scheduler
    with refusal.raised():
        backbone_of(pipeline)


def test_a_shift_of_an_epsilon_model_is_refused() -> None:
    with Refusal(
        "shift=3.0 would be ignored: DDIMScheduler has the levels of its training",
        cause="`SamplerConfig.shift` on a model of epsilon or v.",
        remedy="leave shift out",
    ).raised():
        backbone_of(tiny_pipeline("sd15")).transition_table(SamplerConfig(kind="ddim", shift=3.0))


def test_settings_of_another_class_that_diffusers_keeps_do_not_count() -> None:
    karras = EulerDiscreteScheduler(**sd_noise(use_karras_sigmas=True))
    own = DDIMScheduler.from_config(karras.config, clip_sample=False)
    assert own.config.use_karras_sigmas
    assert from_scheduler(ddim_scheduler(own), 4, "ddim", 1.0).num_steps == 4


def test_zero_terminal_snr_gives_a_v_model_s_own_images() -> None:
    pipeline = tiny_pipeline("sd15")
    pipeline.scheduler = DDIMScheduler(
        **sd_noise(clip_sample=False, rescale_betas_zero_snr=True, prediction_type="v_prediction"),
        timestep_spacing="trailing",
    )
    backbone = backbone_of(pipeline)
    table = from_scheduler(backbone.scheduler, 10, "ddim", 1.0)
    assert table.sigmas[0] == 1
    assert table.coefficients().isfinite().all()
    latents, images = ode_images(backbone, PROMPTS[:2], 3.0)
    expected = own_call(pipeline, PROMPTS[:2], latents.clone(), 3.0)
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("config", "refusal"),
    [
        (
            {"time_cond_proj_dim": 8},
            Refusal(
                "takes guidance as an embedding (time_cond_proj_dim=8)",
                cause="The UNet is distilled, as LCM's are.",
                remedy="load the model that it was distilled from",
            ),
        ),
        (
            {"in_channels": 9},
            Refusal(
                "takes 9 channels and gives 4: it inpaints or edits",
                cause="The UNet wants an image beside the noise.",
                remedy="load a model that makes images from prompts alone",
            ),
        ),
        (
            {"encoder_hid_dim_type": "ip_image_proj"},
            Refusal(
                "takes images beside the prompt (encoder_hid_dim_type='ip_image_proj')",
                cause="An IP-Adapter is loaded.",
                remedy="call pipeline.unload_ip_adapter()",
            ),
        ),
    ],
)
def test_a_unet_that_wants_more_than_a_prompt_is_refused(config: dict[str, Any], refusal: Refusal) -> None:
    pipeline = tiny_pipeline("sd15")
    if "time_cond_proj_dim" in config:
        pipeline.unet = unet(cross_attention_dim=16, **config)
    else:
        pipeline.unet.register_to_config(**config)
    with refusal.raised():
        backbone_of(pipeline)
