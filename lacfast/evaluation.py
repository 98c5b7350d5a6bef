"""Scores on prompts that are not trained on, with noise that every evaluation shares."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lacfast import reference
from lacfast.advantages import RewardNormalizer
from lacfast.profiling import span
from lacfast.prompts import PromptSet
from lacfast.records import Evaluation, NoiseKey, TransitionTable
from lacfast.reward_queue import RewardQueue
from lacfast.rollout_sampler import RolloutSampler
from lacfast.scoring import RewardSet

EVALUATION_IDS = 1 << 40
"""First sample id of evaluations: the same noise for every evaluation, never seen in training."""


def evaluate(
    sampler: RolloutSampler,
    table: TransitionTable,
    prompts: PromptSet,
    scorers: Sequence[RewardSet],
    normalizer: RewardNormalizer,
    *,
    seed: int,
    guidance_scale: float,
    batch_size: int,
) -> Evaluation:
    """Sample one image per prompt and score it.

    Args:
        sampler: of the policy, with the weights that are to be judged. Its critic's values give the
            explained variance.
        table: the sampler.
        prompts: n of them.
        scorers: the rewards that train, then those that are only reported.
        normalizer: units of the critic's values.
        seed: of the noise.
        guidance_scale: 1 runs without the unconditional half.
        batch_size: images at a time; does not change the result.
    """
    backbone = sampler.backbone
    device = next(backbone.model.parameters()).device
    rewards = RewardSet.union(scorers)
    images: list[Tensor] = []
    values: list[Tensor] = []
    pending = []

    def decode(latents: Tensor) -> Tensor:
        decoded = backbone.decode(latents)
        # Batches are decoded in their order; those of the GPU wait for themselves in the decoder's thread.
        images.append(decoded.cpu())
        return decoded

    with RewardQueue(rewards, decode=decode, decode_aside=device.type == "cuda") as queue:
        for start in range(0, len(prompts), batch_size):
            part = prompts.take(range(start, min(start + batch_size, len(prompts))))
            ids = range(EVALUATION_IDS + start, EVALUATION_IDS + start + len(part))
            rollout = sampler.sample(
                table,
                part.texts,
                part.metadata,
                NoiseKey.create(seed, ids, device),
                guidance_scale=guidance_scale,
                keep_features=False,
                batch_size=min(batch_size, len(prompts)),
            )
            pending.append(queue.submit(rollout.clean_latents, part.texts, part.metadata))
            values.append(rollout.values.transpose(0, 1).cpu())
        with span("reward/wait"):
            parts = [future.result() for future in pending]
    scores = {name: torch.cat([part[name] for part in parts]) for name in rewards.names}
    returns = torch.stack([scores[name] for name in scorers[0].names], dim=1)
    return Evaluation(
        scores,
        _explained_variance(torch.cat(values), returns, normalizer),
        torch.cat(images),
        prompts.texts,
    )


def _explained_variance(values: Tensor, returns: Tensor, normalizer: RewardNormalizer) -> Tensor:
    """(T, M) from values (n, T, M) and raw rewards (n, M)."""
    if values.shape[-1] == 0:
        return values.new_zeros(values.shape[1:])
    targets = normalizer.standardize(returns)[:, None].expand_as(values)
    return reference.explained_variance(values, targets)
