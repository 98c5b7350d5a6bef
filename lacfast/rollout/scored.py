"""Scores on prompts that are not trained on, with noise that every evaluation shares."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lacfast import reference
from lacfast.prompts import PromptSet
from lacfast.records import Evaluation, FirstSampleId, NoiseKey, Rollout, TransitionTable
from lacfast.rewards.normalizer import RewardNormalizer
from lacfast.rewards.queue import RewardQueue
from lacfast.rewards.registry import RewardSet
from lacfast.rewards.reward import RewardError
from lacfast.rollout.sampler import RolloutSampler
from lacfast.runtime.profiling import span

RELIABILITY_BINS = 10


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
            ids = range(FirstSampleId.EVALUATION + start, FirstSampleId.EVALUATION + start + len(part))
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
    predicted, variance, calibration = torch.cat(values), torch.zeros(table.num_steps, 0), {}
    if predicted.shape[-1] > 0:
        rewarded = torch.stack([scores[name] for name in scorers[0].names], dim=1)
        returns = normalizer.standardize(rewarded).to(predicted)
        variance = reference.explained_variance(predicted, returns[:, None].expand_as(predicted))
        heads = scorers[0].names if normalizer.heads is None else normalizer.heads.names
        calibration = {
            name: reliability(predicted[..., head], returns[:, head]) for head, name in enumerate(heads)
        }
    return Evaluation(scores, variance, torch.cat(images), prompts.texts, calibration)


def reliability(values: Tensor, returns: Tensor, bins: int = RELIABILITY_BINS) -> Tensor:
    """Predicted against mean return in bins of as many states, the points of a reliability diagram.

        value_j = mean_{i in bin j} V_i;   return_j = mean_{i in bin j} R_i    (arXiv 1706.04599, section 2)

    A calibrated critic has return_j = value_j. Bins are quantiles of V over all states; a standard error
    counts the trajectories of a bin, not its states, which share their trajectory's return.

    Args:
        values: (n, T) of every state.
        returns: (n,) of every trajectory, in the same units.
        bins: K, or as many as there are states.

    Returns:
        (3, K) mean value, mean return, standard error of the mean return (NaN for one trajectory).
    """
    order = values.flatten().argsort()
    rows = []
    for members in torch.tensor_split(order, min(bins, len(order))):
        trajectories = members // values.shape[1]
        distinct = torch.unique(trajectories)
        single = returns.new_tensor(math.nan)
        error = returns[distinct].std() / len(distinct) ** 0.5 if len(distinct) > 1 else single
        rows.append(torch.stack([values.flatten()[members].mean(), returns[trajectories].mean(), error]))
    return torch.stack(rows, dim=1)


def collect(
    sample: Callable[[PromptSet, int], Rollout],
    decode: Callable[[Tensor], Tensor],
    rewards: RewardSet,
    prompts: PromptSet,
    first_id: int,
    *,
    part_size: int,
    decode_aside: bool = False,
) -> tuple[Rollout, RewardError | None]:
    """Trajectories for `prompts` and what they are worth.

    Sample ids count from `first_id`, so the result does not depend on `part_size`.

    Args:
        sample: (prompts, first sample id) -> rollout without rewards.
        decode: clean latents -> images (B, 3, H, W) in [0, 1].
        rewards: run in a thread of their own, one part at a time.
        prompts: one per trajectory.
        first_id: of the first trajectory.
        part_size: trajectories sampled at a time; 0: all.
        decode_aside: see RewardQueue; for a model on CUDA.

    Returns:
        The rollout and None; or, when a reward or the decoder failed, the rollout without rewards and the
        error.
    """
    size = part_size or len(prompts)
    parts: list[Rollout] = []
    with RewardQueue(rewards, decode=decode, decode_aside=decode_aside) as queue:
        pending = []
        for start in range(0, len(prompts), size):
            part = sample(prompts.take(range(start, min(start + size, len(prompts)))), first_id + start)
            parts.append(part)
            pending.append(queue.submit(part.clean_latents, part.prompts, part.metadata))
        try:
            with span("reward/wait"):
                scores = [future.result() for future in pending]
        except RewardError as error:
            return Rollout.concatenate(parts), error
    scored = [part.with_rewards(score) for part, score in zip(parts, scores, strict=True)]
    return Rollout.concatenate(scored), None
