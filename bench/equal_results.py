"""How far a peer's loop and lacfast's trainer differ on the same noise and the same rollout.

Both are compared in float64: float32 is exact to 2e-6 along a trajectory of ddim with guidance, on either
side, and a peer finds the noise again as the difference of two stored latents, which at steps of small std
takes more digits away.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from bench.matched_loops import Match, PeerLoop, counted_noise, engine, peer_loop
from bench.peer_loops import samples_of
from lacfast import reference
from lacfast.policy import policy_output
from lacfast.prompts import PromptSet
from lacfast.records import Advantages, Rollout
from lacfast.trainer import LatentActorCriticTrainer


def relative(actual: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm."""
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


def scored_rollout(trainer: LatentActorCriticTrainer, match: Match) -> Rollout:
    """A rollout with its rewards, on the match's own prompts; sample ids count from 0."""
    rollout = trainer.collect(PromptSet.create(match.prompts), 0)
    assert rollout is not None
    return rollout


def sampling_differences(rollout: Rollout, loop: PeerLoop, match: Match) -> dict[str, float]:
    """Differences of the peer's trajectories on our noise: clean latents relative, log-probs absolute."""
    batches = loop.sample(list(rollout.prompts), counted_noise(0))
    steps = rollout.table.trainable_steps
    log_probs = torch.cat([batch["log_probs"] for batch in batches])[:, steps].T
    return {
        "latents": relative(torch.cat([batch["latents_clean"] for batch in batches]), rollout.clean_latents),
        "log_probs": float((log_probs - rollout.log_probs[steps]).abs().max()),
    }


def gradients(optimizer: torch.optim.Optimizer, update: Callable[[], Any]) -> list[Tensor]:
    """What the optimizer is given at each of its steps, as one vector."""
    seen: list[Tensor] = []

    def look(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        seen.append(torch.cat([parameter.grad.flatten() for parameter in parameters]).double())

    handle = optimizer.register_step_pre_hook(look)
    update()
    handle.remove()
    return seen


def in_float64(trainer: LatentActorCriticTrainer, rollout: Rollout) -> Rollout:
    """The same trajectories from the same noise, as a float64 model moves along them."""
    table, noise = rollout.table, rollout.noise
    coefficients = table.coefficients(rollout.latents.device, torch.float64)
    latents, outputs, log_probs = [rollout.latents[0].double()], [], []
    for step in range(table.num_steps):
        rows = torch.full((rollout.batch_size,), step, device=rollout.latents.device)
        timestep = table.timesteps.to(rollout.latents.device)[rows]
        with torch.no_grad():
            forward = policy_output(
                trainer.backbone, latents[-1], timestep, rollout.conditioning, rollout.uncond_conditioning
            )
        assert forward.uncond_output is not None
        scale = trainer.config.sampler.guidance_scale
        output = forward.uncond_output + scale * (forward.output - forward.uncond_output)
        moved = reference.gaussian_step(latents[-1], output, coefficients, rows, noise=noise)
        latents.append(moved.prev_sample)
        outputs.append(output)
        log_probs.append(moved.log_prob)
    stacked = {"latents": latents, "model_outputs": outputs, "log_probs": log_probs}
    return replace(rollout, **{name: torch.stack(tensors) for name, tensors in stacked.items()})


def both_trajectories(match: Match, *, batch_size: int) -> tuple[Tensor, Tensor]:
    """The float64 model's clean latents, ours and the peer's, from the same noise.

    Args:
        match: what both do.
        batch_size: the peer's.
    """
    trainer = engine(match, microbatch_size=batch_size, dtype=torch.float64)
    loop = peer_loop(match, batch_size=batch_size, dtype=torch.float64)
    rollout = in_float64(trainer, scored_rollout(trainer, match))
    noise = counted_noise(0)

    def wide_noise(first: int, step: int, like: Tensor) -> Tensor:
        return noise(first, step, like).double()

    batches = loop.sample(list(rollout.prompts), wide_noise)
    return rollout.latents[-1], torch.cat([batch["latents_clean"] for batch in batches])


def both_gradients(
    match: Match, *, batch_size: int, microbatch_size: int, dtype: torch.dtype = torch.float32, **changes: Any
) -> tuple[Tensor, Tensor]:
    """The gradient of one update on one rollout, ours and the peer's, as float64 vectors.

    Args:
        match: what both do.
        batch_size: the peer's.
        microbatch_size: ours.
        dtype: of weights, rollout and maths.
        changes: of our TrainConfig.
    """
    trainer = engine(match, microbatch_size=microbatch_size, dtype=dtype, **changes)
    loop = peer_loop(match, batch_size=batch_size, dtype=dtype)
    rollout = scored_rollout(trainer, match)
    if dtype == torch.float64:
        rollout = in_float64(trainer, rollout)
    advantages: Advantages = trainer.advantages(rollout)
    samples = samples_of(rollout, advantages)
    (own,) = gradients(trainer.learner.policy_update.optimizer, lambda: trainer.update(rollout))
    (theirs,) = gradients(loop.optimizer, lambda: loop.train([samples]))
    return own, theirs
