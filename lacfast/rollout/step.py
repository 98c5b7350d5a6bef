"""One denoising step, as a pure function of static buffers, so that it can be captured in a graph.

Everything that changes between steps, rollouts and schedules is read from device tensors: the step index,
the transition table, the timesteps, the guidance, the prompts, the seed and the sample ids.
"""

from __future__ import annotations

import torch

from lacfast import ops
from lacfast.backbone import Backbone
from lacfast.critic.critic import Critic
from lacfast.critic.trunk import Features
from lacfast.ops.checks import arithmetic_dtype
from lacfast.policy import model_forward, rescaled_guidance
from lacfast.records import INITIAL_STEP
from lacfast.rollout.buffers import SamplerBuffers


def begin(buffers: SamplerBuffers) -> None:
    """Draw the initial latents and set the step index to 0."""
    batch = buffers.sample.shape[0]
    steps = torch.full((batch,), INITIAL_STEP, dtype=torch.int64, device=buffers.sample.device)
    buffers.sample.copy_(ops.normal_noise(tuple(buffers.sample.shape), steps, buffers.inputs.noise))
    buffers.latents[0].copy_(buffers.sample)
    buffers.step.zero_()


@torch.no_grad()
def denoise_step(backbone: Backbone, critic: Critic | None, buffers: SamplerBuffers) -> None:
    """One step of the whole batch: forward, guidance, transition, stores. No host synchronisation.

    With a critic it stores the features or, where they are not kept, the values.
    """
    inputs, (halves, batch) = buffers.inputs, buffers.model_input.shape[:2]
    buffers.model_input.copy_(buffers.sample)
    timestep = inputs.timesteps.index_select(0, buffers.step).expand(halves * batch)
    model_input = buffers.model_input.flatten(0, 1)
    forward = model_forward(
        *(backbone, model_input, timestep, inputs.conditioning),
        halves=halves,
        critic=critic,
        detach=True,
    )
    if buffers.keep_features:
        _store_features(buffers, forward.features)
    elif critic is not None:
        prompts = inputs.conditioning.select(slice(batch))
        values = critic(forward.features, buffers.sample, timestep[:1], prompts)
        buffers.values.index_copy_(0, buffers.step, values.float()[None])
    # A float64 model may move float32 latents; the maths is theirs.
    dtype = arithmetic_dtype(buffers.sample)
    output = forward.output.to(dtype)
    uncond_output = None if forward.uncond_output is None else forward.uncond_output.to(dtype)
    if uncond_output is not None and backbone.rescales_guidance:
        output, uncond_output = rescaled_guidance(output, uncond_output, inputs.guidance_scale), None
    ops.gaussian_step_(
        buffers.sample,
        output.contiguous(),
        inputs.coefficients,
        buffers.step,
        noise=inputs.noise,
        uncond_output=None if uncond_output is None else uncond_output.contiguous(),
        guidance_scale=None if uncond_output is None else inputs.guidance_scale,
        slab=buffers.slab,
    )
    buffers.step.add_(1)


def _store_features(buffers: SamplerBuffers, features: Features) -> None:
    for name, tensor in features.items():
        if name not in buffers.features:
            buffers.features[name] = tensor.new_empty((len(buffers.inputs.timesteps), *tensor.shape))
        buffers.features[name].index_copy_(0, buffers.step, tensor[None])
