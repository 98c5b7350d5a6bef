"""One optimizer step on a minibatch of a rollout: PPO on the actor, regression on the critic.

Nothing here waits for the device: what a step did is a record on the device, which the caller reads.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lacfast import ops
from lacfast.backbone import Backbone
from lacfast.config import PPOConfig
from lacfast.critic.critic import Critic
from lacfast.critic.trunk import Features
from lacfast.learning.optimizers import guarded_step
from lacfast.learning.pairs import (
    CriticBatch,
    Pairs,
    PolicyBatch,
    StateSource,
    all_states,
    critic_batch,
    policy_batch,
)
from lacfast.learning.runner import EAGER, UpdateRunner
from lacfast.learning.step_tables import StepTables
from lacfast.learning.totals import CriticTotals, PolicyTotals
from lacfast.policy import States, apply_guidance, guided_output, policy_output
from lacfast.records import Advantages, Rollout
from lacfast.runtime.profiling import each

MEASURED = 8
"""Pairs of the first optimizer step whose unconditional half runs though it is known: what remains of the
measure of how far the update's forward is from the rollout's."""


def policy_step(
    backbone: Backbone,
    reference: Backbone | None,
    optimizer: Optimizer,
    rollout: Rollout,
    advantages: Advantages,
    pairs: Pairs,
    config: PPOConfig,
    guidance_scale: float,
    *,
    tables: StepTables,
    totals: PolicyTotals,
    failed: Tensor,
    microbatch_size: int,
    reference_outputs: Tensor | None = None,
    is_first: bool = False,
    critic_totals: CriticTotals | None = None,
    runner: UpdateRunner = EAGER,
) -> Tensor:
    """One optimizer step of the actor on a minibatch; returns its record, see PolicyTotals.

    Args:
        backbone: with the policy.
        reference: for the KL. None: no KL.
        optimizer: of the policy.
        rollout: what `pairs` point into.
        advantages: of the rollout.
        pairs: the minibatch.
        config: loss and clipping.
        guidance_scale: that the rollout was made with.
        tables: of the rollout's transition table.
        totals: memory for the step's sums.
        failed: see guarded_step.
        microbatch_size: pairs at a time, at most.
        reference_outputs: (K, B, ...) at the trained steps, see ReferenceStep. None: they are computed
            with each microbatch.
        is_first: the weights are those that made the rollout, so but for MEASURED pairs the unconditional
            half need not run.
        critic_totals: also add the critic's gradients, on features of the actor's own forward. None: do not.
        runner: of the step's parts.
    """

    def gradient(batch: PolicyBatch) -> None:
        policy_gradient(
            backbone, reference, batch, tables, config, guidance_scale, totals, critic_totals=critic_totals
        )

    def optimize() -> None:
        guarded_step(optimizer, failed, totals.grad_norm, max_grad_norm=config.max_grad_norm)

    optimizer.zero_grad(set_to_none=not runner.keeps_gradients)
    totals.zero_()
    size = runner.size("policy", len(pairs), microbatch_size)
    measured = MEASURED
    for part in each("update/microbatch", pairs.split(size)):
        shaped, mask = runner.shaped(part, size)
        batch = policy_batch(
            rollout,
            advantages,
            tables.timesteps,
            shaped,
            share=_share(part, pairs, tables),
            mask=mask,
            reference_outputs=reference_outputs,
            uncond_rows=measured if is_first else None,
        )
        measured = 0
        runner.gradient("policy", gradient, batch)
    runner.optimize("policy", optimize, optimizer)
    return totals.record()


def _share(part: Pairs, pairs: Pairs, tables: StepTables) -> Tensor:
    # Filled on the device: a copy of a host number would wait for it.
    return torch.full_like(tables.one, len(part) / len(pairs))


def policy_gradient(
    backbone: Backbone,
    reference: Backbone | None,
    batch: PolicyBatch,
    tables: StepTables,
    config: PPOConfig,
    guidance_scale: float,
    totals: PolicyTotals,
    *,
    critic_totals: CriticTotals | None = None,
) -> None:
    """Forward and backward of one microbatch: adds to the weights' gradients and to the totals."""
    # Under "joint" the value's gradient enters the actor here; the head itself learns in critic_step.
    critic = backbone.critic
    joint = critic if critic is not None and critic.config.trunk == "joint" else None
    recorded = critic if critic_totals is not None else None
    read: dict[str, Any] = {"critic": joint or recorded, "detach": joint is None}
    if batch.uncond_rows is None:
        output, features = guided_output(
            *(backbone, batch.states, batch.uncond_conditioning, guidance_scale, config.cfg_grad), **read
        )
    else:
        output, features = known_output(backbone, batch, guidance_scale, **read)
    reference_output = batch.reference_output
    if reference is not None and reference_output is None:
        with torch.no_grad():
            reference_output, _ = guided_output(
                reference, batch.states, batch.uncond_conditioning, guidance_scale, "cond"
            )
    loss, stats = ops.ppo_loss(
        output,
        batch.old_model_output,
        batch.advantages,
        tables.coefficients,
        batch.steps,
        noise=batch.noise,
        **vars(config.clip),
        dual_clip=config.dual_clip,
        ratio=config.ratio,
        step_weights=tables.weights,
        mask=batch.mask,
        reference_output=reference_output,
        kl_weight=config.kl_weight,
        kl_gains=None if reference_output is None else tables.kl_gains,
    )
    if joint is not None:
        outputs = critic_outputs(joint, batch.states, features)
        loss = loss + joint.config.joint_weight * joint.loss(outputs, batch.targets, mask=batch.mask)
    loss = loss * batch.share
    loss.backward()  # type: ignore[no-untyped-call]
    totals.add(loss.detach(), stats)
    if recorded is not None and critic_totals is not None:
        critic_gradient(
            recorded,
            CriticBatch(batch.states, features, batch.targets, batch.old_values, batch.share, batch.mask),
            critic_totals,
        )


def known_output(
    backbone: Backbone, batch: PolicyBatch, guidance_scale: float, *, critic: Critic | None, detach: bool
) -> tuple[Tensor, Features]:
    """As guided_output, of the weights that made the rollout, whose detached unconditional half need not run.

        v = v_old + scale (v_cond - stop(v_cond))

    The value is the rollout's and the gradient is that of the conditional half. The first `uncond_rows` pairs
    run in full all the same, so that the mismatch of the forwards stays measured.
    """
    states, rows = batch.states, slice(batch.uncond_rows)
    forward = policy_output(
        *(backbone, states.sample, states.timestep, states.conditioning, None), critic=critic, detach=detach
    )
    cond = forward.output
    known = apply_guidance(cond, cond.detach(), guidance_scale, base=batch.old_model_output)
    if batch.uncond_rows and batch.uncond_conditioning is not None:
        with torch.no_grad():
            uncond = backbone.predict(
                states.sample[rows], states.timestep[rows], batch.uncond_conditioning.select(rows)
            )
        measured = apply_guidance(cond[rows], uncond, guidance_scale)
        known = torch.cat([measured, known[len(measured) :]])
    return known.contiguous(), forward.features


def kept_features(source: StateSource, pairs: Pairs) -> Features:
    """What was kept for the critic of these pairs, name -> (P, ...)."""
    return {name: tensor[pairs.steps, pairs.rows] for name, tensor in source.features.items()}


def critic_outputs(critic: Critic, states: States, features: Features) -> Tensor:
    """The head's outputs (P, M, K) for states on `features` (P, ...) of the actor."""
    return critic.outputs(features, states.sample, states.timestep, states.conditioning)


def critic_gradient(critic: Critic, batch: CriticBatch, totals: CriticTotals) -> None:
    """Forward and backward of one microbatch: adds to the critic's gradients and to `totals`."""
    outputs = critic_outputs(critic, batch.states, batch.features)
    loss = critic.loss(outputs, batch.targets, batch.old_values, batch.mask) * batch.share
    loss.backward()  # type: ignore[no-untyped-call]
    totals.loss.add_(loss.detach())


def critic_step(
    critic: Critic,
    optimizer: Optimizer,
    source: StateSource,
    targets: Tensor,
    pairs: Pairs,
    config: PPOConfig,
    *,
    tables: StepTables,
    totals: CriticTotals,
    failed: Tensor,
    microbatch_size: int,
    old_values: Tensor | None = None,
    runner: UpdateRunner = EAGER,
) -> Tensor:
    """One critic optimizer step towards standardised targets (B, M); returns loss and gradient norm (2,).

    `pairs` point into `source`. `old_values` (T, B, M) are those of the rollout in today's units, for
    CriticConfig.value_clip; the other arguments are policy_step's.
    """

    def gradient(batch: CriticBatch) -> None:
        critic_gradient(critic, batch, totals)

    optimizer.zero_grad(set_to_none=not runner.keeps_gradients)
    totals.zero_()
    size = runner.size("critic", len(pairs), microbatch_size)
    for part in each("update/microbatch", pairs.split(size)):
        shaped, mask = runner.shaped(part, size)
        batch = critic_batch(
            source,
            kept_features(source, shaped),
            targets,
            tables.timesteps,
            shaped,
            share=_share(part, pairs, tables),
            mask=mask,
            old_values=old_values,
        )
        runner.gradient("critic", gradient, batch)
    return recorded_critic_step(optimizer, config, totals, failed, runner)


def probe_critic(critic: Critic, rollout: Rollout, targets: Tensor, tables: StepTables, count: int) -> None:
    """Forward and backward of `count` states, for MicrobatchSize.find."""
    states = all_states(rollout).select(slice(count))
    batch = critic_batch(
        *(rollout, kept_features(rollout, states), targets, tables.timesteps, states), share=tables.one
    )
    critic_gradient(critic, batch, CriticTotals.create(tables))
    critic.zero_grad(set_to_none=True)


def recorded_critic_step(
    optimizer: Optimizer, config: PPOConfig, totals: CriticTotals, failed: Tensor, runner: UpdateRunner
) -> Tensor:
    """The critic's optimizer step on gradients that a policy_step added; returns as critic_step does."""

    def optimize() -> None:
        guarded_step(optimizer, failed, totals.grad_norm, max_grad_norm=config.max_grad_norm)

    runner.optimize("critic", optimize, optimizer)
    return totals.record()
