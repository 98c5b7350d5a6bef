"""What one training iteration costs, counted and not timed: FLOPs and bytes."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lacfast.config import TrainConfig
from lacfast.counters import counted, saved_bytes
from lacfast.critic import Critic
from lacfast.protocols import Backbone, Features
from lacfast.records import Conditioning, TransitionTable
from lacfast.sampler import policy_output

ADAM_BYTES = 8
"""Two float32 moments per trained weight."""


@dataclass(frozen=True)
class Costs:
    """Of one iteration; FLOPs count a multiply-add as two, bytes are those that live at the same time."""

    parameters: int
    """Of the model, adapters included."""
    trained_parameters: int
    """Of the policy."""
    critic_parameters: int
    """Trained for the critic besides."""
    images: int
    """Generated and scored."""
    sampling_forwards: int
    """Samples through the model while sampling, both halves of guidance."""
    update_pairs: int
    """(sample, step) pairs that the policy is trained on."""
    sampling_flops: int
    """The policy's forwards."""
    value_flops: int
    """The critic's values of the sampled states."""
    decode_flops: int
    reference_flops: int
    """The reference model's forwards for the KL; 0 without one."""
    update_forward_flops: int
    update_backward_flops: int
    critic_flops: int
    """The critic's own update."""
    weight_bytes: int
    """Model and critic."""
    training_bytes: int
    """Gradients, moments and the average of trained weights."""
    rollout_bytes: int
    """Latents, outputs and what the critic reads, for all steps."""
    activation_bytes: int
    """Kept by the forward of the smallest possible microbatch, one pair."""

    @property
    def rollout_flops(self) -> int:
        """Trajectories, their values and their images."""
        return self.sampling_flops + self.value_flops + self.decode_flops

    @property
    def update_flops(self) -> int:
        """Of the policy."""
        return self.reference_flops + self.update_forward_flops + self.update_backward_flops

    @property
    def flops(self) -> int:
        return self.rollout_flops + self.update_flops + self.critic_flops


def count(
    backbone: Backbone,
    critic: Critic | None,
    table: TransitionTable,
    conditioning: Conditioning,
    config: TrainConfig,
) -> Costs:
    """Count an iteration of `config` by running one sample through the model.

    Args:
        backbone: best on the meta device, where a forward costs nothing; see backbones.blueprint.
        critic: of the backbone.
        table: the sampler.
        conditioning: (1, ...) of a prompt.
        config: what would be trained.
    """
    is_guided = config.sampler.guidance_scale > 1
    ppo, batch, steps = config.ppo, config.batch_size, table.num_steps
    device = next(backbone.model.parameters()).device
    sample = torch.zeros(1, *backbone.latent_shape, device=device)
    timestep = torch.full((1,), float(table.timesteps[0]), device=device)
    features: Features = {}

    def forward() -> Tensor:
        nonlocal features
        result = policy_output(
            backbone,
            sample,
            timestep,
            conditioning,
            conditioning if is_guided else None,
            cfg_grad=ppo.cfg_grad,
            critic=critic,
        )
        features = result.features
        return result.output if result.uncond_output is None else result.output + result.uncond_output

    with torch.no_grad():
        step_flops = counted(forward).flops
        value_flops = (
            0 if critic is None else counted(lambda: critic(features, sample, timestep, conditioning)).flops
        )
        decode_flops = counted(lambda: backbone.decode(sample)).flops
    if config.gradient_checkpointing:
        backbone.enable_gradient_checkpointing()
    pair_flops = counted(lambda: _differentiated(forward())).flops
    uncond_flops = 0
    if is_guided and ppo.cfg_grad == "cond" and ppo.reuse_uncond:
        uncond_flops = counted(lambda: _unconditional(backbone, sample, timestep, conditioning)).flops
    activation_bytes = saved_bytes(forward, backbone.model)
    state_flops = 0
    if critic is not None:
        state_flops = counted(lambda: _differentiated(critic(features, sample, timestep, conditioning))).flops
    pairs = math.ceil(ppo.timestep_fraction * len(table.trainable_steps) * batch) * ppo.num_inner_epochs
    # The first optimizer step knows its unconditional half, but for a handful of pairs that measure it.
    known = pairs // (ppo.num_minibatches * ppo.num_inner_epochs)
    trained = sum(parameter.numel() for parameter in backbone.policy_parameters())
    learned = 0 if critic is None else _count(critic)
    states = [*features.values(), sample]
    # Of older rollouts only what the critic reads is kept.
    kept = [*states * ppo.critic_rollouts, sample]
    return Costs(
        parameters=_count(backbone.model),
        trained_parameters=trained,
        critic_parameters=learned,
        images=batch,
        sampling_forwards=batch * steps * (2 if is_guided else 1),
        update_pairs=pairs,
        sampling_flops=batch * steps * step_flops,
        value_flops=batch * steps * value_flops,
        decode_flops=batch * decode_flops,
        reference_flops=pairs * step_flops if ppo.kl_weight > 0 else 0,
        update_forward_flops=pairs * step_flops - known * uncond_flops,
        # What checkpointing recomputes is counted with the backward pass, where it runs.
        update_backward_flops=pairs * (pair_flops - step_flops),
        critic_flops=batch * steps * ppo.num_inner_epochs * state_flops,
        weight_bytes=_bytes(backbone.model) + (0 if critic is None else _bytes(critic)),
        training_bytes=(trained + learned) * (4 + ADAM_BYTES) + (4 * trained if config.ema_decay else 0),
        rollout_bytes=batch * steps * sum(tensor.numel() * tensor.element_size() for tensor in kept),
        activation_bytes=activation_bytes,
    )


@torch.no_grad()
def _unconditional(
    backbone: Backbone, sample: Tensor, timestep: Tensor, conditioning: Conditioning
) -> Tensor:
    return backbone.predict(sample, timestep, conditioning)


def _differentiated(output: Tensor) -> None:
    output.sum().backward()  # type: ignore[no-untyped-call]


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _bytes(module: nn.Module) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in module.parameters())
