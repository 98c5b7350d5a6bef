"""Rollouts with their rewards: sampled in parts, each decoded and scored while the next one is sampled."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from lacfast.profiling import span
from lacfast.prompts import PromptSet
from lacfast.records import Rollout
from lacfast.reward_queue import RewardQueue
from lacfast.scoring import RewardError, RewardSet


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
