"""ddpo-pytorch's step and pipeline call: the DDIM paper's formula in float64, diffusers' own results."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, StableDiffusionPipeline
from tiny_pipelines import tiny_pipeline
from torch import Tensor

from lacfast.compat.ddpo import ddim_step_with_logprob, pipeline_with_logprob

CLOSE = 2e-6
"""Relative to the largest element; the inputs are float32, the oracle computes in float64."""
STEPS = 20


def scheduler(**settings: Any) -> DDIMScheduler:
    """SD1.x's, after set_timesteps."""
    defaults = {"steps_offset": 1, "clip_sample": False, "set_alpha_to_one": False}
    made = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", **(defaults | settings)
    )
    made.set_timesteps(STEPS)
    return made


def latents(seed: int, shape: tuple[int, ...] = (3, 4, 6, 5), dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def published(
    made: DDIMScheduler, timestep: int, output: Tensor, sample: Tensor, eta: float, rederive: bool = False
) -> tuple[Tensor, Tensor]:
    """Mean and deviation by the paper's equations 12 and 16, in float64."""
    alphas = made.alphas_cumprod.double()
    signal, following = alphas[timestep], alphas[max(timestep - 1000 // STEPS, 0)]
    output, sample = output.double(), sample.double()
    kind = made.config.prediction_type
    if kind == "epsilon":
        noise = output
        clean = (sample - (1 - signal).sqrt() * noise) / signal.sqrt()
    elif kind == "sample":
        clean = output
        noise = (sample - signal.sqrt() * clean) / (1 - signal).sqrt()
    else:
        clean = signal.sqrt() * sample - (1 - signal).sqrt() * output
        noise = signal.sqrt() * output + (1 - signal).sqrt() * sample
    if made.config.clip_sample:
        clean = clean.clamp(-1, 1)
    if rederive:
        noise = (sample - signal.sqrt() * clean) / (1 - signal).sqrt()
    std = eta * ((1 - following) / (1 - signal) * (1 - signal / following)).sqrt()
    return following.sqrt() * clean + (1 - following - std**2).sqrt() * noise, std


def density(landed: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    terms = -((landed.double() - mean) ** 2) / (2 * std**2) - std.log() - math.log(2 * math.pi) / 2
    return terms.flatten(1).mean(1)


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = CLOSE) -> None:
    assert (actual.double() - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize(("clip", "rederive"), list(itertools.product([False, True], repeat=2)))
def test_every_step_is_the_published_one(kind: str, clip: bool, rederive: bool) -> None:
    made = scheduler(prediction_type=kind, clip_sample=clip)
    sample, output = latents(1), latents(2)
    for timestep in made.timesteps:
        noise = torch.randn(sample.shape, generator=torch.Generator().manual_seed(7)).double()
        mean, std = published(made, int(timestep), output, sample, 1.0, rederive)
        prev_sample, log_prob = ddim_step_with_logprob(
            made, output, timestep, sample, 1.0, rederive, torch.Generator().manual_seed(7)
        )
        assert_close(prev_sample, mean + std * noise)
        again = ddim_step_with_logprob(
            made, output, timestep.expand(3), sample, 1.0, rederive, prev_sample=prev_sample
        )[1]
        # x' and mu are rounded to 6e-8 of their size and their difference is about std.
        rounding = 1e-6 * float(mean.abs().max() / std)
        for judged in (log_prob, again):
            assert (judged - density(prev_sample, mean, std)).abs().max() <= rounding


@pytest.mark.parametrize("shape", [(3, 7, 4), (2, 4, 2, 3, 3)])
def test_latents_of_any_rank_are_stepped(shape: tuple[int, ...]) -> None:
    made, sample, output = scheduler(), latents(1, shape), latents(2, shape)
    steps = made.timesteps[: shape[0]]
    prev_sample, log_prob = ddim_step_with_logprob(made, output, steps, sample)
    for row, timestep in enumerate(steps):
        assert_close(prev_sample[row], published(made, int(timestep), output[row], sample[row], 0.0)[0])
    assert log_prob.tolist() == [0.0] * shape[0]


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_without_noise_it_is_the_schedulers_own_step_with_log_prob_zero(kind: str) -> None:
    made, sample, output = scheduler(prediction_type=kind), latents(1), latents(2).requires_grad_()
    for timestep in made.timesteps:
        prev_sample, log_prob = ddim_step_with_logprob(made, output, timestep, sample)
        expected = made.step(output, timestep, sample, eta=0.0)[0]
        assert_close(prev_sample, expected)
        assert not log_prob.any()
    log_prob = ddim_step_with_logprob(made, output, 501, sample, prev_sample=latents(3))[1]
    log_prob.sum().backward()
    assert output.grad is not None
    assert not output.grad.any()


def test_the_last_step_ends_at_the_first_training_timestep_as_in_the_original() -> None:
    sample, output = latents(1), latents(2)
    ends = {
        to_one: ddim_step_with_logprob(scheduler(set_alpha_to_one=to_one), output, 1, sample)[0]
        for to_one in (False, True)
    }
    assert torch.equal(ends[False], ends[True])


def test_the_last_step_without_an_offset_has_log_prob_zero() -> None:
    made, sample = scheduler(steps_offset=0), latents(1)
    assert made.timesteps[-1] == 0
    prev_sample, log_prob = ddim_step_with_logprob(made, latents(2), made.timesteps[-1], sample, eta=1.0)
    assert_close(prev_sample, sample.double())
    assert not log_prob.any()


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("clip", [True, False])
def test_gradients_flow_as_through_the_formula(given: bool, clip: bool) -> None:
    made, sample = scheduler(clip_sample=clip), latents(1)
    ours, oracle = latents(2).requires_grad_(), latents(2).double().requires_grad_()
    landed = sample + 0.1 * latents(5) if given else None
    generator = None if given else torch.Generator().manual_seed(3)
    prev_sample, log_prob = ddim_step_with_logprob(
        made, ours, 501, sample, 0.8, generator=generator, prev_sample=landed
    )
    mean, std = published(made, 501, oracle, sample, 0.8)
    noise = torch.randn(sample.shape, generator=torch.Generator().manual_seed(3)).double()
    expected = mean + std * noise if landed is None else landed.double()
    weights = torch.tensor([1.0, -2.0, 0.5])
    (log_prob @ weights + (0 if given else prev_sample.square().sum())).backward()
    (
        density(expected.detach(), mean, std) @ weights.double() + (0 if given else expected.square().sum())
    ).backward()
    assert ours.grad is not None
    assert oracle.grad is not None
    assert_close(ours.grad, oracle.grad, 1e-5)


@pytest.mark.parametrize("clip", [True, False])
def test_half_precision_latents_have_the_log_prob_of_what_is_stored(clip: bool) -> None:
    made = scheduler(clip_sample=clip)
    sample, output = latents(1, dtype=torch.bfloat16), latents(2, dtype=torch.bfloat16)
    prev_sample, log_prob = ddim_step_with_logprob(
        made, output, 501, sample, 1.0, generator=torch.Generator().manual_seed(3)
    )
    again = ddim_step_with_logprob(made, output, 501, sample, 1.0, prev_sample=prev_sample)[1]
    mean, std = published(made, 501, output, sample, 1.0)
    assert prev_sample.dtype == torch.bfloat16
    assert log_prob.dtype == torch.float32
    assert_close(log_prob, density(prev_sample, mean, std), 1e-5)
    assert_close(again, log_prob)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"timestep": 1000}, "training timesteps 0 to 999"),
        ({"timestep": torch.tensor([0.5])}, "training timesteps"),
        ({"eta": -1.0}, "must lie in"),
        ({"prev_sample": latents(3), "generator": torch.Generator()}, "both given"),
        ({"self": DDIMScheduler()}, "set_timesteps"),
        ({"self": FlowMatchEulerDiscreteScheduler()}, "no DDIMScheduler"),
    ],
)
def test_what_cannot_be_meant_is_refused(arguments: dict[str, Any], message: str) -> None:
    call = {"self": scheduler(), "timestep": 501, **arguments}
    with pytest.raises(ValueError, match=message):
        ddim_step_with_logprob(model_output=latents(2), sample=latents(1), **call)


@pytest.fixture(scope="module")
def pipeline() -> StableDiffusionPipeline:
    made: StableDiffusionPipeline = tiny_pipeline("sd15")
    # SD 1.x is published with set_alpha_to_one=False.
    made.scheduler = DDIMScheduler.from_config(
        made.scheduler.config, clip_sample=False, set_alpha_to_one=False
    )
    return made


@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
def test_without_noise_the_pipeline_makes_diffusers_own_images(
    pipeline: StableDiffusionPipeline, guidance_scale: float
) -> None:
    settings: dict[str, Any] = {
        "num_inference_steps": 4,
        "guidance_scale": guidance_scale,
        "num_images_per_prompt": 2,
        "output_type": "np",
    }
    prompts = ["a red cat", "the sky"]
    images, flagged, all_latents, all_log_probs = pipeline_with_logprob(
        pipeline, prompts, generator=torch.Generator().manual_seed(5), **settings
    )
    expected = pipeline(prompts, generator=torch.Generator().manual_seed(5), **settings).images
    assert np.abs(images - expected).max() < 1e-4
    assert flagged is None
    assert [tuple(latent.shape) for latent in all_latents] == [(4, 4, 8, 8)] * 5
    assert all(not log_prob.any() and log_prob.shape == (4,) for log_prob in all_log_probs)


def test_stored_trajectories_have_the_log_probs_that_were_returned(pipeline: StableDiffusionPipeline) -> None:
    embeds = pipeline.encode_prompt(["a cat", "a dog"], torch.device("cpu"), 1, True, None)
    calls = []
    images, _, all_latents, all_log_probs = pipeline_with_logprob(
        pipeline,
        num_inference_steps=5,
        guidance_scale=3.0,
        eta=1.0,
        generator=torch.Generator().manual_seed(5),
        prompt_embeds=embeds[0],
        negative_prompt_embeds=embeds[1],
        output_type="latent",
        callback=lambda step, timestep, sample: calls.append((step, int(timestep))),
        callback_steps=2,
    )
    timesteps = pipeline.scheduler.timesteps
    assert torch.equal(images, all_latents[-1])
    assert calls == [(step, int(timesteps[step])) for step in (0, 2, 4)]
    for step, timestep in enumerate(timesteps):
        with torch.no_grad():
            uncond, cond = (
                pipeline.unet(all_latents[step], timestep, encoder_hidden_states=half)[0]
                for half in (embeds[1], embeds[0])
            )
        log_prob = ddim_step_with_logprob(
            pipeline.scheduler,
            uncond + 3.0 * (cond - uncond),
            timestep.expand(2),
            all_latents[step],
            eta=1.0,
            prev_sample=all_latents[step + 1],
        )[1]
        assert torch.allclose(log_prob, all_log_probs[step], atol=1e-3)
        assert log_prob.isfinite().all()


def test_pictures_come_in_the_type_that_is_asked_for(pipeline: StableDiffusionPipeline) -> None:
    settings: dict[str, Any] = {"num_inference_steps": 2, "guidance_scale": 4.0, "guidance_rescale": 0.5}
    pictures = pipeline_with_logprob(pipeline, "a cat", **settings)[0]
    assert [picture.size for picture in pictures] == [(16, 16)]
    assert pipeline_with_logprob(pipeline, "a cat", output_type="pt", **settings)[0].shape == (1, 3, 16, 16)


def test_the_pipeline_call_refuses_what_diffusers_refuses(pipeline: StableDiffusionPipeline) -> None:
    with pytest.raises(ValueError, match="divisible by 8"):
        pipeline_with_logprob(pipeline, "a cat", height=15)
