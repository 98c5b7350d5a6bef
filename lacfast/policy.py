"""The policy's forward: conditional and unconditional output of the model, joined by guidance."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lacfast.backbone import Backbone
from lacfast.critic.critic import Critic
from lacfast.critic.trunk import Features
from lacfast.records import Conditioning, Static


def joined_conditioning(conditioning: Conditioning, uncond_conditioning: Conditioning | None) -> Conditioning:
    if uncond_conditioning is None:
        return conditioning
    return Conditioning.concatenate([conditioning, uncond_conditioning])


@dataclass(frozen=True)
class PolicyOutput:
    """The forwards of one state, before guidance."""

    output: Tensor
    """(B, ...) with the prompt."""
    uncond_output: Tensor | None
    """(B, ...) without it, None without guidance."""
    features: Features
    """What the critic reads of the conditional forward, (B, ...) each; empty without a critic."""


def policy_output(
    backbone: Backbone,
    sample: Tensor,
    timestep: Tensor,
    conditioning: Conditioning,
    uncond_conditioning: Conditioning | None,
    *,
    cfg_grad: str = "cond",
    critic: Critic | None = None,
    detach: bool = True,
) -> PolicyOutput:
    """Conditional and, with guidance, unconditional output.

    Both halves of guidance are one forward, which launches half as much and multiplies larger matrices. Only
    where one half takes part in the backward pass and the other does not, each has its own.

    Args:
        cfg_grad: with "cond" the unconditional output has no gradient, with "both" it has.
        critic: whose features to record. They come from the conditional forward alone.
        detach: cut the features off the actor's graph.
    """
    if uncond_conditioning is not None and (cfg_grad == "both" or not torch.is_grad_enabled()):
        return model_forward(
            *(backbone, torch.cat([sample, sample]), torch.cat([timestep, timestep])),
            joined_conditioning(conditioning, uncond_conditioning),
            halves=2,
            critic=critic,
            detach=detach,
        )
    forward = model_forward(backbone, sample, timestep, conditioning, halves=1, critic=critic, detach=detach)
    if uncond_conditioning is None:
        return forward
    with torch.no_grad():
        return replace(forward, uncond_output=backbone.predict(sample, timestep, uncond_conditioning))


def model_forward(
    backbone: Backbone,
    sample: Tensor,
    timestep: Tensor,
    conditioning: Conditioning,
    *,
    halves: int,
    critic: Critic | None,
    detach: bool,
) -> PolicyOutput:
    """Arguments (G B, ...); where G = `halves` is 2, those without a prompt lie behind those with one."""
    recording: AbstractContextManager[Features] = (
        nullcontext({}) if critic is None else critic.record(backbone.model, detach=detach)
    )
    with recording as features:
        output = backbone.predict(sample, timestep, conditioning)
    if halves == 1:
        return PolicyOutput(output, None, features)
    cond, uncond = output.chunk(2)
    return PolicyOutput(cond, uncond, {name: tensor[: len(cond)] for name, tensor in features.items()})


@dataclass(frozen=True)
class States(Static):
    """What model and critic are given of P pairs."""

    sample: Tensor
    """(P, ...) latents before the step."""
    timestep: Tensor
    """(P,) as the model takes it."""
    conditioning: Conditioning


def guided_output(
    backbone: Backbone,
    states: States,
    uncond_conditioning: Conditioning | None,
    guidance_scale: float,
    cfg_grad: str,
    *,
    critic: Critic | None = None,
    detach: bool = False,
) -> tuple[Tensor, Features]:
    """The model's output (P, ...) after guidance, and what `critic` reads of its conditional forward."""
    forward = policy_output(
        backbone,
        states.sample,
        states.timestep,
        states.conditioning,
        uncond_conditioning,
        cfg_grad=cfg_grad,
        critic=critic,
        detach=detach,
    )
    cond, uncond = forward.output, forward.uncond_output
    if uncond is None:
        guided = cond
    elif backbone.rescales_guidance:
        guided = rescaled_guidance(cond, uncond, guidance_scale)
    else:
        guided = apply_guidance(cond, uncond, guidance_scale)
    return guided.contiguous(), forward.features


def rescaled_guidance(cond: Tensor, uncond: Tensor, scale: float | Tensor) -> Tensor:
    """Guidance of a family that rescales it, in rollout and update by the same operations.

        v = v_uncond + scale (v_cond - v_uncond);   v |v_cond| / |v|, each norm over the last dimension

    Source: diffusers' QwenImagePipeline, flow_grpo's loop of it.
    """
    guided = uncond + scale * (cond - uncond)
    own, wanted = (torch.linalg.vector_norm(each, dim=-1, keepdim=True) for each in (guided, cond))
    rescaled: Tensor = guided * (wanted / own)
    return rescaled


def apply_guidance(cond: Tensor, uncond: Tensor, scale: float, *, base: Tensor | None = None) -> Tensor:
    # One rounding of scale * difference + uncond, as the kernel has: the first ratio is then exactly 1.
    return torch.add(uncond if base is None else base, cond - uncond, alpha=scale)
