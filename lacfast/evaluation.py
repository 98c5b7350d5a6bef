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
    scores: dict[str, list[Tensor]] = {}
    images, values, returns = [], [], []
    backbone = sampler.backbone
    for start in range(0, len(prompts), batch_size):
        part = prompts.take(range(start, min(start + batch_size, len(prompts))))
        ids = range(EVALUATION_IDS + start, EVALUATION_IDS + start + len(part))
        rollout = sampler.sample(
            table,
            part.texts,
            part.metadata,
            NoiseKey.create(seed, ids, next(backbone.model.parameters()).device),
            guidance_scale=guidance_scale,
            keep_features=False,
            batch_size=min(batch_size, len(prompts)),
        )
        with span("decode"):
            decoded = backbone.decode(rollout.clean_latents)
        for scorer in scorers:
            for name, score in scorer.score(decoded, part.texts, part.metadata).items():
                scores.setdefault(name, []).append(score)
        images.append(decoded.cpu())
        values.append(rollout.values.transpose(0, 1).cpu())
        returns.append(torch.stack([scores[name][-1] for name in scorers[0].names], dim=1))
    return Evaluation(
        {name: torch.cat(parts) for name, parts in scores.items()},
        _explained_variance(torch.cat(values), torch.cat(returns), normalizer),
        torch.cat(images),
        prompts.texts,
    )


def _explained_variance(values: Tensor, returns: Tensor, normalizer: RewardNormalizer) -> Tensor:
    """(T, M) from values (n, T, M) and raw rewards (n, M)."""
    if values.shape[-1] == 0:
        return values.new_zeros(values.shape[1:])
    targets = normalizer.standardize(returns)[:, None].expand_as(values)
    return reference.explained_variance(values, targets)
