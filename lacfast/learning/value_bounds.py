"""What a critic can explain of a reward: no less than its prompts tell, no more than its states do.

    EV_k = 1 - Var(R - V_k) / Var(R)
    floor = Var(E[R | prompt]) / Var(R);   ceiling_k = Var(E[R | x_k, prompt]) / Var(R)
    score_k = (EV_k - floor) / (ceiling_k - floor)

A critic at the floor has learned only which prompts are hard; at the ceiling what is left is the noise of the
steps to come, which no critic knows. Both are shares of variance between groups, so they come from a one-way
analysis of variance, whose components have no bias at any group size: the plain variance of the groups' means
would count a share 1/n of the noise within them as explained.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lacfast.backbone import Backbone
from lacfast.config import TrainConfig
from lacfast.distributed import ALONE, World
from lacfast.distributed.sharding import gathered
from lacfast.records import FirstSampleId, NoiseKey, Rollout
from lacfast.rewards.heads import stack_rewards
from lacfast.rewards.normalizer import RewardNormalizer
from lacfast.rewards.registry import RewardSet
from lacfast.rollout.buffers import SamplerBuffers, SamplerInputs
from lacfast.rollout.outcomes import outcomes
from lacfast.rollout.scored import decoded_and_scored, finished
from lacfast.rollout.step import denoise_step
from lacfast.runtime.memory import BatchSize
from lacfast.transfer import to_device

SMALLEST_SPAN = 0.02
"""Below this distance of ceiling and floor there is no score: their errors are as large."""


@dataclass(frozen=True)
class VarianceComponents:
    """Variance of a quantity with groups: that of the groups' means, and the mean of that within them."""

    between: Tensor
    """(M,) without bias, so below 0 now and then."""
    within: Tensor
    """(M,)"""

    @property
    def share(self) -> Tensor:
        """(M,) between / (between + within); 0 where nothing varies."""
        total = self.between + self.within
        return torch.where(total > 0, self.between / torch.where(total > 0, total, 1.0), 0.0)


def variance_components(samples: Tensor, groups: Tensor) -> VarianceComponents:
    """One-way analysis of variance with groups of any sizes (Searle, Casella, McCulloch, 1992, section 3.6).

        within = SS_within / (N - G);   between = (SS_between / (G - 1) - within) / n_0
        n_0 = (N - sum_g n_g^2 / N) / (G - 1)

    Args:
        samples: (N, M).
        groups: (N,) int64, the group of each sample.

    Returns:
        float64 components (M,).

    Raises:
        ValueError: for fewer than two groups, or when no group has two samples.
    """
    _, members, sizes = torch.unique(groups, return_inverse=True, return_counts=True)
    count, num_groups = len(samples), len(sizes)
    if num_groups < 2 or count == num_groups:
        raise ValueError(
            f"{count} samples in {num_groups} groups cannot tell variance between groups from variance "
            "within them; give at least two groups, and some group at least two samples"
        )
    wide, sizes = samples.double(), sizes.to(samples.device, torch.float64)
    sums = wide.new_zeros((num_groups, wide.shape[1])).index_add_(0, members, wide)
    means = sums / sizes[:, None]
    within = (wide - means[members]).square().sum(dim=0) / (count - num_groups)
    spread = (sizes[:, None] * (means - wide.mean(dim=0)).square()).sum(dim=0) / (num_groups - 1)
    mean_size = (count - sizes.square().sum() / count) / (num_groups - 1)
    return VarianceComponents((spread - within) / mean_size, within)


def prompt_floor(rewards: Tensor, prompts: Sequence[str]) -> Tensor:
    """(M,) share of the variance of rewards (B, M) that their prompts explain.

    The G prompts are all that the explained variance is measured on and not a sample of others, so the
    variance between them counts (G - 1) / G.

    Raises:
        ValueError: when no prompt occurs twice.
    """
    numbers = {prompt: number for number, prompt in enumerate(dict.fromkeys(prompts))}
    groups = torch.tensor([numbers[prompt] for prompt in prompts], device=rewards.device)
    components = variance_components(rewards, groups)
    return replace(components, between=components.between * (len(numbers) - 1) / len(numbers)).share


@dataclass(frozen=True)
class ValueBounds:
    """Between what a critic's explained variance lies."""

    floor: Tensor
    """(M,) what the prompt alone explains."""
    ceiling: Tensor
    """(T, M) what the state explains; 1 behind the last stochastic step."""
    images: int
    """Generated and scored for it."""

    def score(self, explained_variance: Tensor) -> Tensor:
        """(T, M) of an explained variance (T, M): 0 at the floor, 1 at the ceiling, NaN where they meet."""
        span = self.ceiling - self.floor
        score = (explained_variance.to(span) - self.floor) / span
        return torch.where(span > SMALLEST_SPAN, score, math.nan)

    def overall_score(self, explained_variance: Tensor) -> float:
        """Score of all steps and heads together, sum(EV - floor) / sum(ceiling - floor).

        Steps where floor and ceiling are close weigh little here; in a mean of scores they would weigh most.
        """
        span = float((self.ceiling - self.floor).sum())
        above = float((explained_variance.to(self.ceiling) - self.floor).sum())
        return above / span if span > SMALLEST_SPAN * self.ceiling.numel() else math.nan


def value_bounds(
    backbone: Backbone,
    rollout: Rollout,
    rewards: RewardSet,
    normalizer: RewardNormalizer,
    config: TrainConfig,
    world: World = ALONE,
) -> ValueBounds:
    """Floor and ceiling of the explained variance of what each head predicts, by branched completions.

    `bound_states` trajectories of the rollout are taken back to a step and completed `completions` times with
    fresh noise; what differs between completions of one state is what the state does not tell. Shares are
    without bias at any number of completions, so rather more states than completions.

    Args:
        backbone: the policy that made the rollout, unchanged since.
        rollout: with rewards, on held-out prompts, some of them twice or more.
        rewards: those of the rollout.
        normalizer: says what a head predicts of them.
        config: pretrain.completions and bound_states, the rollout's guidance, and eval_batch_size at a time.
        world: the ranks that have the rollout together; each completes its own rows.

    Raises:
        ValueError: when completions of states, or prompts, cannot be compared.
        RewardError: when a reward fails on a completion.
    """
    if config.pretrain.completions == 0:
        raise ValueError("pretrain.completions=0 completes no state, so there is no ceiling; use at least 2")
    size = BatchSize(config.eval_batch_size, unit="sample", setting="eval_batch_size")
    whole = outcomes(rollout, world)
    floor = prompt_floor(normalizer.head_rewards(stack_rewards(whole)), whole.prompts).cpu()
    states = min(config.pretrain.bound_states, rollout.total)
    rows = torch.linspace(0, rollout.total - 1, states).round().long()
    branches = torch.unique(rows).repeat_interleave(config.pretrain.completions)
    here = branches if rollout.share is None else branches - rollout.share.first
    is_own = (here >= 0) & (here < rollout.batch_size)
    # A deterministic completion needs no measuring.
    measured = range(max(rollout.table.trainable_steps, default=-1) + 1)
    ceiling = floor.new_ones(rollout.num_steps, len(floor))
    with gathered(backbone.model):
        for step in measured:
            ids = torch.arange(len(branches)) + FirstSampleId.COMPLETIONS + step * len(branches)
            completed = _completed(backbone, rollout, step, here[is_own], ids[is_own], config, size)
            pending = [scores for _, scores in decoded_and_scored(completed, backbone, rewards)]
            scored = finished(pending, world, f"the completions of step {step}")
            scores = torch.cat(
                [
                    torch.zeros(0, len(rewards.names)),
                    *(torch.stack(list(part.values()), dim=1) for part in scored),
                ]
            )
            scores = world.rows(scores, f"the scores of the completions of step {step}")
            ceiling[step] = variance_components(normalizer.head_rewards(scores), branches).share
    return ValueBounds(floor, ceiling, len(measured) * len(branches))


@dataclass(frozen=True)
class _Completions:
    """What `decoded_and_scored` takes."""

    clean_latents: Tensor
    prompts: list[str]
    metadata: list[dict[str, Any]]
    step: int
    """Denoising step whose states were completed."""

    def origin_of_nan(self) -> str:
        """What made NaN or infinity of images that have some."""
        if bool(self.clean_latents.isfinite().all()):
            return "the decoder, of finite latents,"
        return f"the completion from denoising step {self.step}"


def _completed(
    backbone: Backbone,
    rollout: Rollout,
    step: int,
    rows: Tensor,
    ids: Tensor,
    config: TrainConfig,
    size: BatchSize,
) -> Iterator[_Completions]:
    """Completions with noise `ids` (P,) of the trajectories `rows` (P,) from a step on, part by part."""
    device, guidance_scale = rollout.latents.device, config.sampler.guidance_scale

    def completions(part: slice) -> _Completions:
        numbers = rows[part].tolist()
        return _Completions(
            complete(
                backbone, rollout, step, rows[part].to(device), ids[part], guidance_scale=guidance_scale
            ),
            [rollout.prompts[row] for row in numbers],
            [rollout.metadata[row] for row in numbers],
            step,
        )

    return size.parts(completions, len(rows))


@torch.no_grad()
def complete(
    backbone: Backbone, rollout: Rollout, step: int, rows: Tensor, ids: Tensor, *, guidance_scale: float = 1.0
) -> Tensor:
    """Clean latents (P, ...) sampled from the states of trajectories `rows` (P,) before `step`.

    Args:
        backbone: the policy.
        rollout: whose states, sampler and seed are used.
        step: row of the transition table.
        rows: (P,) int64, repeats allowed, where the rollout lies.
        ids: (P,) int64 of the noise.
        guidance_scale: above 1 the unconditional half runs too.
    """
    uncond, device = rollout.uncond_conditioning, next(backbone.model.parameters()).device
    inputs = SamplerInputs.create(
        rollout.table,
        NoiseKey(to_device(rollout.noise.seed, device), to_device(ids, device)),
        rollout.conditioning.select(rows).to(device),
        None if uncond is None else uncond.select(rows).to(device),
        guidance_scale,
    )
    buffers = SamplerBuffers.allocate(inputs, backbone.latent_shape, model_dtype=backbone.dtype)
    buffers.sample.copy_(to_device(rollout.latents[step, rows], device))
    buffers.step.fill_(step)
    for _ in range(step, rollout.table.num_steps):
        denoise_step(backbone, None, buffers)
    return buffers.sample
