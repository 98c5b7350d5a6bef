"""The steered denoising loop: value the states, choose, step, move along the gradient."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lacfast import ops
from lacfast.config import SteeringConfig
from lacfast.policy import rescaled_guidance
from lacfast.records import Conditioning, TransitionTable
from lacfast.steering import guidance
from lacfast.steering.forward import StateForward, SteeredModel
from lacfast.steering.method import Method
from lacfast.steering.particles import Particles
from lacfast.transfer import to_device


@dataclass
class SignTest:
    """Runs once in a call, at the first state that takes a gradient."""

    gain: float = math.nan

    def run(
        self,
        model: SteeredModel,
        particles: Particles,
        forward: StateForward,
        timestep: Tensor,
        conditioning: Conditioning,
    ) -> None:
        """
        Raises:
            ValueError: when V does not rise along its gradient.
        """
        if not math.isnan(self.gain) or forward.gradient is None or forward.values is None:
            return
        tried = slice(guidance.SIGN_TEST_STATES)

        def value_of(sample: Tensor) -> Tensor:
            moved = model.evaluate(
                sample, timestep, conditioning, particles.rows[tried], with_gradient=False
            ).values
            assert moved is not None
            return moved

        self.gain = guidance.sign_test(
            particles.sample[tried], forward.gradient[tried], forward.values[tried], value_of
        )


def denoise(
    model: SteeredModel,
    table: TransitionTable,
    config: SteeringConfig,
    method: Method,
    particles: Particles,
    conditioning: Conditioning,
    guidance_scale: float,
    sign_test: SignTest,
) -> tuple[Particles, Tensor]:
    """The trajectories that reach the end with the values of their states, and which steps were finite, (T,).

    Args:
        model: forwards.
        table: the sampler.
        config: of guidance.
        method: the method's decisions; its state is of these images.
        particles: pure noise.
        conditioning: (G, ...) of the images.
        guidance_scale: of classifier-free guidance, used where the model has an unconditional half.
        sign_test: of the whole call.
    """
    device = particles.sample.device
    coefficients, timesteps = table.coefficients(device), to_device(table.timesteps, device)
    own_scale = None if model.uncond_conditioning is None else torch.full((1,), guidance_scale, device=device)
    is_finite: list[Tensor] = []
    for step, is_guided in enumerate(guidance.guided_steps(config, table)):
        timestep = timesteps[step : step + 1]
        forward = model.evaluate(
            particles.sample, timestep, conditioning, particles.rows, with_gradient=is_guided
        )
        sign_test.run(model, particles, forward, timestep, conditioning)
        if forward.values is not None:
            particles = particles.with_values(forward.values)
            kept = method.keep(particles, forward.values, step)
            particles, forward = _chosen(method, particles, forward, kept)
        parents = method.multiply(particles, step)
        particles, forward = _chosen(method, particles, forward, parents)
        steps = torch.full_like(particles.rows, step)
        output, uncond_output, scale = forward.output, forward.uncond_output, own_scale
        if uncond_output is not None and scale is not None and model.backbone.rescales_guidance:
            output, uncond_output, scale = rescaled_guidance(output, uncond_output, scale), None, None
        moved = ops.gaussian_step(
            particles.sample,
            output.contiguous(),
            coefficients,
            steps,
            noise=particles.noise,
            uncond_output=None if uncond_output is None else uncond_output.contiguous(),
            guidance_scale=scale,
        )
        particles = particles.at(moved.prev_sample)
        if forward.gradient is not None:
            displacement = guidance.mean_displacement(
                forward.gradient, moved.model_output, config, table, step
            )
            particles = particles.at(particles.sample + displacement)
            if config.method == "smc":
                drawn = ops.normal_noise(tuple(displacement.shape), steps, particles.noise)
                std = float(table.std[step])
                method.correct(guidance.log_proposal_ratio(displacement, drawn, std))
        # On the device: nobody waits for it here.
        is_finite.append(particles.sample.isfinite().all())
    return particles, torch.stack(is_finite)


def _chosen(
    method: Method, particles: Particles, forward: StateForward, positions: Tensor | None
) -> tuple[Particles, StateForward]:
    """Trajectories at `positions` with what the model said of them: nothing runs again."""
    if positions is None:
        return particles, forward
    particles = particles.select(positions)
    return particles.renamed(method.names(particles)), forward.select(positions)
