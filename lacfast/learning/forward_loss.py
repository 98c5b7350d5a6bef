"""The loss of a microbatch on the forward process: DiffusionNFT's or advantage weighted matching's."""

from __future__ import annotations

import torch
from torch import Tensor

from lacfast.config import AWM, NFT, ForwardProcess
from lacfast.learning.batches import PolicyBatch
from lacfast.learning.step_tables import StepTables
from lacfast.records import PPOStats
from lacfast.reference import awm_losses, nft_losses, noised
from lacfast.reference.surrogate import masked_mean, sums_per_step
from lacfast.reference.transition import reduce
from lacfast.rollout.renoising import forward_noise


def forward_loss(
    objective: ForwardProcess,
    output: Tensor,
    batch: PolicyBatch,
    tables: StepTables,
    *,
    advantage_clip: float,
    anchor_output: Tensor | None,
    kl_weight: float,
) -> tuple[Tensor, PPOStats]:
    """Mean loss () of the pairs, and detached statistics in PPO's columns: squared distances per element from
    the old policy's and the anchor's output stand for the KL, and there is neither ratio nor clip.

    Args:
        objective: NFT or AWM.
        output: (P, ...) of the policy at the batch's states, with gradient.
        batch: of a rollout that was noised anew.
        tables: its steps.
        advantage_clip: bound of the advantages, at which a weight is 1.
        anchor_output: (P, ...) of the anchor. None: no KL.
        kl_weight: of the distance from it.
    """
    assert batch.clean is not None, "a rollout noised anew has its clean latents in the batch"
    assert tables.forward is not None, "the learner makes its tables for the objective"
    eps = forward_noise(tuple(batch.clean.shape), batch.steps, batch.noise)
    _, target = noised(batch.clean, eps, tables.forward, batch.steps)
    weights, rows = batch.advantages / advantage_clip, tables.forward[batch.steps]
    from_old = _distance(output, batch.old_model_output)
    if isinstance(objective, NFT):
        gains = rows[:, 4]
        losses = nft_losses(output, batch.old_model_output, target, weights, gains, beta=objective.beta)
        losses = advantage_clip * losses
    elif isinstance(objective, AWM):
        levels = rows[:, 1]
        losses = awm_losses(output, target, weights, levels, power=objective.power)
        losses = losses + objective.old_weight * from_old
    else:
        raise NotImplementedError(f"no loss for objective={objective}")
    from_anchor = torch.zeros_like(from_old)
    if anchor_output is not None:
        from_anchor = _distance(output, anchor_output)
        losses = losses + kl_weight * from_anchor
    none = torch.zeros_like(from_old)
    columns = torch.stack([none, from_old, from_anchor, none], dim=1).detach()
    sums = sums_per_step(columns, batch.steps, batch.mask, len(tables.forward))
    return masked_mean(losses, batch.mask), PPOStats(columns, sums)


def _distance(output: Tensor, fixed: Tensor) -> Tensor:
    return reduce((output - fixed.detach().to(output.dtype)) ** 2, "mean")
