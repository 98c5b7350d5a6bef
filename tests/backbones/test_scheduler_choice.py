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
    FlowMatchHeunDiscreteScheduler,
    HeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from refusals import Refusal
from tiny_pipelines import PROMPTS, backbone_of, ode_images, own_call, sd_noise, tiny_pipeline, unet

from lacfast import SamplerConfig
from lacfast.backbones.scheduler_choice import (
    BECOME_DDIM,
    DDIM_ALREADY,
    OWN_LEVELS,
    ddim_scheduler,
    flow_scheduler,
)
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
    assert type(chosen).__name__ in ("DDIMScheduler", name)


SETTINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "leading": {"timestep_spacing": "leading", "steps_offset": 1},
    "leading without an offset": {"timestep_spacing": "leading", "steps_offset": 0},
    "trailing": {"timestep_spacing": "trailing"},
    "linspace": {"timestep_spacing": "linspace"},
    "karras": {"use_karras_sigmas": True},
    "exponential": {"use_exponential_sigmas": True},
    "beta": {"use_beta_sigmas": True},
    "lu": {"use_lu_lambdas": True},
    "flow": {"use_flow_sigmas": True, "flow_shift": 2.0, "prediction_type": "flow_prediction"},
    "range": {"sigma_min": 0.1, "sigma_max": 10.0},
    "log-linear": {"interpolation_type": "log_linear"},
    "ends at the least": {"final_sigmas_type": "sigma_min"},
    "cut": {"lambda_min_clipped": -3.0},
    "zero SNR": {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
    "zero SNR of epsilon": {"rescale_betas_zero_snr": True},
    "continuous": {"timestep_type": "continuous", "prediction_type": "v_prediction"},
}
"""What moves a scheduler's noise levels, in one class or another."""


def with_settings(name: str, settings: dict[str, Any]) -> Any:
    """None where the class does not have them."""
    kind = getattr(diffusers, name)
    known = inspect.signature(kind.__init__).parameters
    if not settings.keys() <= known.keys():
        return None
    noise = {key: value for key, value in sd_noise(clip_sample=False).items() if key != "steps_offset"}
    return kind(**{key: value for key, value in noise.items() if key in known} | settings)


@pytest.mark.parametrize("name", [*DDIM_ALREADY, *BECOME_DDIM])
def test_whatever_moves_the_noise_levels_of_an_epsilon_model_they_are_the_scheduler_s_own(name: str) -> None:
    """Or refused: never another schedule without a word."""
    if name == "DPMSolverSDEScheduler":
        pytest.importorskip("torchsde")
    for told, settings in SETTINGS.items():
        scheduler = with_settings(name, settings)
        if scheduler is None:
            continue
        if told in REFUSED[""] | REFUSED.get(name, set()):
            with pytest.raises(ValueError, match=f"^{name} "):
                ddim_scheduler(scheduler)
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            table = from_scheduler(ddim_scheduler(scheduler), 12, "ode", 0.0)
        scheduler.set_timesteps(12)
        own = scheduler.timesteps.double()
        if name not in OWN_LEVELS:
            # Methods of second order tell a step's middle too, and DDIM has whole timesteps alone.
            apart = (table.timesteps.double()[:, None] - own).abs().amin(dim=1)
            assert float(apart.max()) <= 0.5, told
        else:
            torch.testing.assert_close(table.timesteps.double(), own, rtol=0, atol=1e-4, msg=told)
            levels = scheduler.sigmas.double()
            noise = levels / (1 + levels**2).sqrt()
            torch.testing.assert_close(table.sigmas, noise, rtol=0, atol=1e-6, msg=told)


_MOVED = {"karras", "exponential", "beta"}
REFUSED: dict[str, set[str]] = {
    "": {"flow", "zero SNR of epsilon", "continuous"},
    "HeunDiscreteScheduler": _MOVED,
    "KDPM2AncestralDiscreteScheduler": _MOVED,
    "KDPM2DiscreteScheduler": _MOVED,
}
"""Class -> the settings that it is refused with; "" is every class."""


@pytest.mark.parametrize("name", OWN_LEVELS)
def test_a_flow_model_s_solver_gives_its_shifted_levels(name: str) -> None:
    for shift in (1.0, 2.5):
        settings = {"use_flow_sigmas": True, "flow_shift": shift, "prediction_type": "flow_prediction"}
        scheduler = with_settings(name, settings)
        if scheduler is None or scheduler.config.get("final_sigmas_type") != "zero":
            with pytest.raises(ValueError, match=f"^{name} "):
                flow_scheduler(scheduler or scheduler_of(name))
            continue
        with pytest.warns(UserWarning, match=f"{name}'s noise levels are kept"):
            table = from_scheduler(flow_scheduler(scheduler), 8, "flow_sde", 0.7)
        scheduler.set_timesteps(8)
        assert torch.equal(table.timesteps, scheduler.timesteps.float())
        assert torch.equal(table.sigmas, scheduler.sigmas.double())


@pytest.mark.parametrize(
    "scheduler",
    [
        EulerDiscreteScheduler(**sd_noise()),
        *(EulerDiscreteScheduler(**sd_noise(**SETTINGS[each])) for each in ("karras", "exponential", "beta")),
        EulerDiscreteScheduler(**sd_noise(prediction_type="v_prediction", use_karras_sigmas=True)),
        DPMSolverMultistepScheduler(**sd_noise(use_karras_sigmas=True, solver_order=1)),
        UniPCMultistepScheduler(**sd_noise(solver_order=1, disable_corrector=[0, 1, 2, 3])),
    ],
    ids=lambda scheduler: type(scheduler).__name__,
)
@pytest.mark.filterwarnings("ignore:.*becomes DDIM")
def test_solvers_of_first_order_give_the_pipeline_s_own_images_on_their_levels(scheduler: Any) -> None:
    pipeline = tiny_pipeline("sd15")
    pipeline.scheduler = scheduler
    latents, images = ode_images(backbone_of(pipeline), PROMPTS[:1], 3.0)
    scheduler.set_timesteps(4)
    start = float(scheduler.sigmas[0])
    # Euler's coordinates begin with noise alone; ours have the variance of a noised picture.
    scale = (
        (start**2 + 1) ** 0.5 / float(scheduler.init_noise_sigma)
        if "Euler" in type(scheduler).__name__
        else 1
    )
    expected = own_call(pipeline, PROMPTS[:1], scale * latents.clone(), 3.0)
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-4)


@pytest.mark.filterwarnings("ignore:.*noise levels are kept")
def test_a_flow_s_solver_of_first_order_gives_the_pipeline_s_own_images() -> None:
    pipeline = tiny_pipeline("sd3")
    pipeline.scheduler = DPMSolverMultistepScheduler(
        use_flow_sigmas=True, flow_shift=2.5, prediction_type="flow_prediction", solver_order=1
    )
    latents, images = ode_images(backbone_of(pipeline), PROMPTS[:1], 1.0)
    expected = own_call(pipeline, PROMPTS[:1], latents.clone(), 1.0)
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-4)


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
            HeunDiscreteScheduler(**sd_noise(use_karras_sigmas=True)),
            Refusal(
                "HeunDiscreteScheduler with use_karras_sigmas takes steps that DDIM does not have",
                cause="A second-order scheduler has noise levels between those of the training.",
                remedy="HeunDiscreteScheduler.from_config(pipeline.scheduler.config, use_karras_sigmas=None)",
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
            FlowMatchHeunDiscreteScheduler(shift=2.5),
            Refusal(
                "FlowMatchHeunDiscreteScheduler has noise levels or steps that no sampler here makes",
                cause="A flow model's pipeline has a solver that does not tell one noise level per step.",
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
