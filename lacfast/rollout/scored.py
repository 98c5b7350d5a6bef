"""Sample, decode and score, once: training, evaluation and value bounds read one stream of scored parts.

Parts are sampled one after the other while the one before is decoded and scored in threads of its own.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from lacfast import reference
from lacfast.backbone import Backbone
from lacfast.distributed import ALONE, World
from lacfast.distributed.sharding import gathered
from lacfast.prompts import PromptSet
from lacfast.records import Evaluation, FirstSampleId, NoiseKey, Rollout, TransitionTable
from lacfast.rewards.frames import judged_frames
from lacfast.rewards.normalizer import RewardNormalizer
from lacfast.rewards.queue import RewardQueue
from lacfast.rewards.registry import RewardSet
from lacfast.rewards.reward import RewardError
from lacfast.rollout.drift import typical_latents
from lacfast.rollout.memory import HostRoom, RolloutMemory
from lacfast.rollout.sampler import RolloutSampler
from lacfast.runtime.memory import BatchSize
from lacfast.runtime.profiling import span

RELIABILITY_BINS = 10
SKIPPED_IN_A_ROW = 5
"""Rollouts after which on_reward_error="skip" gives up: one may meet a server's restart, five do not."""

Scores = Future[dict[str, Tensor]]
"""name -> (B,) float32 of a part, once they are there."""
Scored = tuple[Rollout, RewardError | None]
"""A rollout with its rewards, or without and the error that they ended with."""


Watcher = Callable[[int, int], None]
"""Called as watcher(trajectories made, trajectories in all): before the first part, and after each."""


def unwatched(made: int, planned: int) -> None:
    """The watcher of work that nobody watches."""


class Scorable(Protocol):
    """Clean latents and what a reward needs to judge their images; a Rollout is one."""

    def origin_of_nan(self) -> str:
        """What made NaN or infinity of images that have some: a denoising step, or the decoder."""

    @property
    def clean_latents(self) -> Tensor:
        """(B, ...)"""

    @property
    def prompts(self) -> list[str]: ...
    @property
    def metadata(self) -> list[dict[str, Any]]: ...


Part = TypeVar("Part", bound=Scorable)
Result = TypeVar("Result")


def sampled(
    sampler: RolloutSampler,
    table: TransitionTable,
    prompts: PromptSet,
    *,
    seed: int,
    first_id: int,
    guidance_scale: float,
    keep_features: bool,
    part_size: BatchSize,
    valued: bool = True,
    policy_version: int | None = None,
    world: World = ALONE,
) -> Iterator[Rollout]:
    """Trajectories for `prompts` without rewards, part by part.

    Sample ids count from `first_id`, so the trajectories depend neither on `part_size` nor on the ranks.
    Sharded weights are whole meanwhile: ranks may have as many parts as they like.

    Args:
        sampler: of the policy; its critic values the states.
        table: the sampler's steps.
        prompts: one per trajectory.
        seed: of the noise.
        first_id: of the first trajectory.
        guidance_scale: 1 runs without the unconditional half.
        keep_features: False drops what the critic's trunk read, for trajectories that nothing learns from.
        part_size: trajectories sampled at a time, fewer once memory has run out; 0: all.
        valued: False leaves the values of what keeps features to who learns from it.
        policy_version: of the weights that sample. None: unknown.
        world: the ranks that sample together; this one makes its share.
    """
    share = world.share(len(prompts))
    ids = range(first_id, first_id + len(prompts))[share.rows]
    prompts = prompts.of_share(share)
    device = next(sampler.backbone.model.parameters()).device

    def sample(rows: slice) -> Rollout:
        rollout = sampler.sample(
            table,
            prompts.texts[rows],
            prompts.metadata[rows],
            NoiseKey.create(seed, ids[rows], device),
            guidance_scale=guidance_scale,
            keep_features=keep_features,
            valued=valued,
            batch_size=min(part_size.size, len(prompts)),
        )
        return replace(rollout, policy_version=policy_version)

    with gathered(sampler.backbone.model, sampler.critic):
        yield from part_size.parts(sample, len(prompts))


def watched(parts: Iterable[Rollout], count: int, watcher: Watcher) -> Iterator[Rollout]:
    """The parts, with the watcher told how many of `count` trajectories are made."""
    done = 0
    watcher(done, count)
    for part in parts:
        done += len(part.prompts)
        yield part
        del part
        watcher(done, count)


def decoded_and_scored(
    parts: Iterable[Part], backbone: Backbone, rewards: RewardSet, *, images: list[Tensor] | None = None
) -> Iterator[tuple[Part, Scores]]:
    """Each part with the scores that will come; all of them are there when the parts have ended.

    Args:
        parts: taken one by one; the next is made while the scores of this one are computed.
        backbone: whose codec decodes; on CUDA in a thread of its own.
        rewards: run in a thread of their own, one part at a time.
        images: gets the images (B, 3, H, W) of every part, or the frames (B, F, 3, H, W) of its videos that
            rewards of images judge, on the CPU. None: they are not kept.
    """

    def decode(latents: Tensor) -> Tensor:
        decoded = backbone.decode(latents)
        if images is not None:
            # Parts are decoded in their order; those of the GPU wait for themselves in the decoder's thread.
            images.append(judged_frames(decoded, rewards.judged).cpu())
        return decoded

    on_gpu = next(backbone.model.parameters()).is_cuda
    with RewardQueue(rewards, decode=decode, decode_aside=on_gpu) as queue:
        for part in parts:
            yield part, queue.submit(part.clean_latents, part.prompts, part.metadata, part.origin_of_nan)
            del part
        with span("reward/wait"):
            queue.close()


def finished(pending: Sequence[Scores], world: World, what: str) -> list[dict[str, Tensor]]:
    """The scores of all parts, once all ranks have theirs.

    Raises:
        RewardError: on every rank, when a reward failed on any.
    """
    scores: list[dict[str, Tensor]] = []
    failures: list[RewardError] = []
    try:
        scores = [part.result() for part in pending]
    except RewardError as error:
        failures = [error]
    for failure in world.entries(failures, what):
        raise failure
    return scores


def collect(
    parts: Iterable[Rollout],
    count: int,
    backbone: Backbone,
    rewards: RewardSet,
    *,
    room: HostRoom | None = None,
    world: World = ALONE,
) -> Scored:
    """One rollout of all `parts` with its rewards, to learn from.

    Args:
        parts: those of this rank.
        count: trajectories of all ranks; the memory of this one's is allocated once.
        backbone: whose codec decodes.
        rewards: that score.
        room: on the host, where the rollout is to lie. None: it stays on the backbone's device.
        world: the ranks that sample a rollout together.

    Returns:
        The rollout and None; or, when a reward or the decoder failed on any rank, the rollout without rewards
        and the error of the first such rank.

    Raises:
        ValueError: when the host has no such room.
    """
    memory = RolloutMemory(count, room, world)
    pending = [scores for _, scores in decoded_and_scored(map(memory.add, parts), backbone, rewards)]
    try:
        scored = finished(pending, world, "the rewards of the rollout")
    except RewardError as error:
        return memory.rollout(), error
    # Named by the scores: in their order the heads of a critic are.
    found = {name: torch.cat([part[name] for part in scored]) for name in scored[0]}
    return memory.rollout().with_rewards(found), None


class RewardFailures:
    """What becomes of rollouts whose rewards failed."""

    def __init__(self, policy: str) -> None:
        """`policy`: TrainConfig.on_reward_error."""
        self.policy = policy
        self.in_a_row = 0

    def unless_skipped(self, work: Callable[[], Result], what: str) -> Result | None:
        """What `work` returns; None where its rewards fail and `what` is skipped."""
        try:
            return work()
        except RewardError as error:
            self.take_in(error, what)
            return None

    def take_in(self, error: RewardError | None, what: str) -> None:
        """Take in how the scoring of a rollout or evaluation ended; warns of `what` is skipped.

        Raises:
            RewardError: under "raise", and where one after the other failed: nothing is learned then.
        """
        if error is None:
            self.in_a_row = 0
            return
        if self.policy == "raise":
            raise error
        self.in_a_row += 1
        if self.in_a_row >= SKIPPED_IN_A_ROW:
            raise RewardError(
                f"the rewards of {self.in_a_row} rollouts in a row failed, so nothing is learned; mend the "
                f"cause and go on. The last error: {error}"
            ) from error
        warnings.warn(f"{what} skipped: {error}", stacklevel=4)


def judged(
    sampler: RolloutSampler,
    table: TransitionTable,
    prompts: PromptSet,
    *,
    seed: int,
    guidance_scale: float,
    part_size: BatchSize,
    watcher: Watcher,
    world: World = ALONE,
) -> Iterator[Rollout]:
    """Trajectories that an evaluation judges, part by part, with the noise that all evaluations share.

    Args as in `sampled`; `watcher` is told of those of this rank.
    """
    parts = sampled(
        *(sampler, table, prompts),
        seed=seed,
        first_id=FirstSampleId.EVALUATION,
        guidance_scale=guidance_scale,
        keep_features=False,
        part_size=part_size,
        world=world,
    )
    return watched(parts, world.share(len(prompts)).count, watcher)


def evaluate(
    parts: Iterable[Rollout],
    backbone: Backbone,
    scorers: Sequence[RewardSet],
    normalizer: RewardNormalizer,
    world: World = ALONE,
) -> Evaluation:
    """Scores, images and how well the critic foretold them.

    Args:
        parts: sampled with the weights that are to be judged; their values give the explained variance. Of
            each only images, prompts, values and typical latents are kept.
        backbone: whose codec decodes.
        scorers: the rewards that train, then those that are only reported.
        normalizer: units of the critic's values.
        world: ranks with parts of their own. Each gets all scores; the images go to the first alone.

    Raises:
        RewardError: when a reward failed on any rank.
    """
    rewards = RewardSet.union(scorers)
    images: list[Tensor] = []
    prompts: list[str] = []
    values, typical, pending = [], [], []
    for part, scores_of_part in decoded_and_scored(parts, backbone, rewards, images=images):
        prompts += part.prompts
        values.append(part.values.transpose(0, 1))
        typical.append(typical_latents(part.clean_latents))
        pending.append(scores_of_part)
        del part
    scored = finished(pending, world, "the rewards of the evaluation")
    scores = {
        name: world.rows(torch.cat([part[name] for part in scored]), f"the evaluation's {name}")
        for name in rewards.names
    }
    # Read once: a read of every part would hold up the sampling of the next.
    predicted = world.rows(torch.cat(values), "the evaluation's values").cpu()
    found = world.rows(torch.cat(typical), "the evaluation's typical latents").cpu()
    prompts = world.entries(prompts, "the evaluation's prompts")
    variance, calibration = torch.zeros(predicted.shape[1], 0), {}
    if predicted.shape[-1] > 0:
        rewarded = torch.stack([scores[name] for name in scorers[0].names], dim=1)
        returns = normalizer.standardize(rewarded).to(predicted)
        variance = reference.explained_variance(predicted, returns[:, None].expand_as(predicted))
        heads = scorers[0].names if normalizer.heads is None else normalizer.heads.names
        calibration = {
            name: reliability(predicted[..., head], returns[:, head]) for head, name in enumerate(heads)
        }
    shown = world.rows_on_first(torch.cat(images), "the evaluation's images")
    return Evaluation(scores, variance, shown, prompts, found, calibration)


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
