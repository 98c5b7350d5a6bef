"""ddpo-pytorch's functions on lacfast's ops: the DDIM step with log-prob, the pipeline call, the statistics.

What is fixed against the originals: eta = 0 and the last step of a scheduler with steps_offset = 0 have
log-prob 0, not NaN; the log-prob is that of the returned latents after rounding to their dtype, so that it
can be recomputed from what is stored; a plain number is a timestep too; nothing waits for the host in a
step; integer rewards keep the fraction of their advantages; and current diffusers is supported.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
from torch import Tensor

from lacfast.advantages import PromptStatistics as PerPromptStatTracker
from lacfast.compat.ddim_step import Generators, ddim_step_with_logprob

__all__ = ["PerPromptStatTracker", "ddim_step_with_logprob", "pipeline_with_logprob"]


@torch.no_grad()
def pipeline_with_logprob(
    self: Any,
    prompt: str | list[str] | None = None,
    height: int | None = None,
    width: int | None = None,
    num_inference_steps: int = 50,
    guidance_scale: float = 7.5,
    negative_prompt: str | list[str] | None = None,
    num_images_per_prompt: int | None = 1,
    eta: float = 0.0,
    generator: Generators = None,
    latents: Tensor | None = None,
    prompt_embeds: Tensor | None = None,
    negative_prompt_embeds: Tensor | None = None,
    output_type: str | None = "pil",
    return_dict: bool = True,
    callback: Callable[[int, int, Tensor], None] | None = None,
    callback_steps: int = 1,
    cross_attention_kwargs: dict[str, Any] | None = None,
    guidance_rescale: float = 0.0,
) -> tuple[Any, list[bool] | None, list[Tensor], list[Tensor]]:
    """Sample a StableDiffusionPipeline with a DDIMScheduler and keep every latent and log-prob.

    Args:
        self: the pipeline, by the original's name: a StableDiffusionPipeline, whose scheduler's timesteps
            are set.
        prompt: P prompts, or prompt_embeds; B = P num_images_per_prompt.
        height: of the images in pixels. None: the UNet's sample_size.
        width: likewise.
        num_inference_steps: T, denoising steps.
        guidance_scale: classifier-free guidance; up to 1 the unconditional half does not run.
        negative_prompt: in place of "" in the unconditional half.
        num_images_per_prompt: samples of each prompt.
        eta: DDIM's noise; at 0 every log-prob is 0.
        generator: of the initial latents, then of the steps.
        latents: (B, C, H, W) initial latents. None: drawn.
        prompt_embeds: (P, L, D) in place of prompt.
        negative_prompt_embeds: (P, L, D) in place of negative_prompt.
        output_type: "pil", "np", "pt" or "latent".
        return_dict: without effect, as in the original: the result is always this tuple.
        callback: called with (step, timestep, latents) every callback_steps steps.
        callback_steps: at least 1.
        cross_attention_kwargs: for the attention processors.
        guidance_rescale: phi of arXiv 2305.08891, eq. 16.

    Returns:
        Images of output_type, the safety checker's verdicts (None without one), T + 1 latents
        (B, C, H, W) from pure noise to clean, and T log-probs (B,).

    Raises:
        ValueError: inputs that the pipeline's own call refuses, or another scheduler.
    """
    pipeline = self
    height = height or pipeline.unet.config.sample_size * pipeline.vae_scale_factor
    width = width or pipeline.unet.config.sample_size * pipeline.vae_scale_factor
    pipeline.check_inputs(
        prompt, height, width, callback_steps, negative_prompt, prompt_embeds, negative_prompt_embeds
    )
    device, guided = pipeline._execution_device, guidance_scale > 1.0
    repeats = num_images_per_prompt or 1
    embeds, negative_embeds = pipeline.encode_prompt(
        prompt,
        device,
        repeats,
        guided,
        negative_prompt,
        prompt_embeds=prompt_embeds,
        negative_prompt_embeds=negative_prompt_embeds,
        lora_scale=(cross_attention_kwargs or {}).get("scale"),
    )
    scheduler = pipeline.scheduler
    scheduler.set_timesteps(num_inference_steps, device=device)
    sample = pipeline.prepare_latents(
        len(embeds), pipeline.unet.config.in_channels, height, width, embeds.dtype, device, generator, latents
    )
    conditioning = torch.cat([negative_embeds, embeds]) if guided else embeds
    all_latents, all_log_probs = [sample], []
    with pipeline.progress_bar(total=num_inference_steps) as progress:
        for step, timestep in enumerate(scheduler.timesteps):
            model_input = scheduler.scale_model_input(torch.cat([sample] * 2) if guided else sample, timestep)
            output = pipeline.unet(
                model_input,
                timestep,
                encoder_hidden_states=conditioning,
                cross_attention_kwargs=cross_attention_kwargs,
                return_dict=False,
            )[0]
            if guided:
                uncond, cond = output.chunk(2)
                output = uncond + guidance_scale * (cond - uncond)
                if guidance_rescale > 0.0:
                    output = rescale_noise_cfg(  # type: ignore[no-untyped-call]
                        output, cond, guidance_rescale=guidance_rescale
                    )
            sample, log_prob = ddim_step_with_logprob(
                scheduler, output, timestep, sample, eta=eta, generator=generator
            )
            all_latents.append(sample)
            all_log_probs.append(log_prob)
            progress.update()
            if callback is not None and step % callback_steps == 0:
                callback(step, timestep, sample)
    images, flagged = _decode(pipeline, sample, output_type, embeds.dtype)
    return images, flagged, all_latents, all_log_probs


def _decode(
    pipeline: Any, sample: Tensor, output_type: str | None, dtype: torch.dtype
) -> tuple[Any, list[bool] | None]:
    """Images of `output_type` and the safety checker's verdicts."""
    image, flagged = sample, None
    if output_type != "latent":
        decoded = pipeline.vae.decode(sample / pipeline.vae.config.scaling_factor, return_dict=False)[0]
        image, flagged = pipeline.run_safety_checker(decoded, pipeline._execution_device, dtype)
    denormalize = [True] * len(image) if flagged is None else [not flag for flag in flagged]
    images = pipeline.image_processor.postprocess(image, output_type=output_type, do_denormalize=denormalize)
    pipeline.maybe_free_model_hooks()
    return images, flagged
