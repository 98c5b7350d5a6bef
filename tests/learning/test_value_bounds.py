"""Floor and ceiling are without bias where both are known, at any number of samples per group."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from linear_chain import PROMPTS, LinearChain, linear_reward, moments
from refusals import Refusal
from torch import Tensor

from lacfast import LatentActorCriticTrainer, SamplerConfig, TrainConfig
from lacfast.config import Fixed, ValuePretrainingConfig
from lacfast.learning.value_bounds import (
    ValueBounds,
    complete,
    prompt_floor,
    value_bounds,
    variance_components,
)
from lacfast.prompts import PromptSet
from lacfast.records import Rollout
from lacfast.rewards.normalizer import RewardNormalizer
from lacfast.rewards.registry import RewardSet

BETWEEN, WITHIN = torch.tensor([0.3, 2.0]), torch.tensor([1.0, 0.5])


def grouped_samples(sizes: list[int], generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """(N, 2) of a model with variance BETWEEN groups and WITHIN them, and the groups (N,)."""
    groups = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    means = BETWEEN.sqrt() * torch.randn(len(sizes), 2, generator=generator)
    return means[groups] + WITHIN.sqrt() * torch.randn(len(groups), 2, generator=generator), groups


@pytest.mark.parametrize("sizes", [[2] * 8, [1, 2, 5, 3, 1, 4]], ids=["pairs", "unequal"])
def test_variance_components_have_no_bias(sizes: list[int]) -> None:
    generator = torch.Generator().manual_seed(0)
    found = [variance_components(*grouped_samples(sizes, generator)) for _ in range(1500)]
    for truth, estimates in (
        (BETWEEN, torch.stack([one.between for one in found])),
        (WITHIN, torch.stack([one.within for one in found])),
    ):
        error = estimates.std(dim=0) / len(found) ** 0.5
        assert ((estimates.mean(dim=0) - truth).abs() < 3.5 * error).all()


def test_the_plain_variance_of_group_means_would_be_biased() -> None:
    """Why there is a correction: with two samples per group half the noise looks explained."""
    generator = torch.Generator().manual_seed(0)
    samples, _ = grouped_samples([2] * 4000, generator)
    naive = samples.view(-1, 2, 2).mean(dim=1).var(dim=0)
    torch.testing.assert_close(naive, BETWEEN + WITHIN / 2, rtol=0.1, atol=0)


def test_the_floor_is_the_share_of_the_prompts_and_does_not_depend_on_their_order() -> None:
    generator = torch.Generator().manual_seed(0)
    samples, groups = grouped_samples([40] * 200, generator)
    prompts = [f"prompt {number}" for number in groups.tolist()]
    floor = prompt_floor(samples, prompts)
    torch.testing.assert_close(floor.float(), BETWEEN / (BETWEEN + WITHIN), rtol=0, atol=0.05)
    order = torch.randperm(len(prompts), generator=generator)
    again = prompt_floor(samples[order], [prompts[row] for row in order.tolist()])
    torch.testing.assert_close(floor, again)


def test_what_does_not_vary_has_share_zero() -> None:
    assert prompt_floor(torch.full((6, 1), 2.0), ["a", "b"] * 3).item() == 0


@pytest.mark.parametrize("prompts", [["a", "b", "c"], ["a", "a", "a"]], ids=["all differ", "all alike"])
def test_prompts_that_cannot_be_compared_are_refused(prompts: list[str]) -> None:
    with Refusal(
        "groups cannot tell variance between groups from variance within them",
        cause="A floor on prompts of which none occurs twice.",
        remedy="give at least two groups, and some group at least two samples",
    ).raised():
        prompt_floor(torch.randn(3, 1), prompts)


def chain_rollout(window: tuple[int, int] | None = None, count: int = 800) -> Rollout:
    config = TrainConfig(
        batch_size=count,
        sampler=SamplerConfig(num_steps=5, noise_level=0.8, window=None if window is None else Fixed(window)),
        pretrain=ValuePretrainingConfig(),
    )
    trainer = LatentActorCriticTrainer(LinearChain(), linear_reward, list(PROMPTS), config)
    rollout = trainer.collect(PromptSet.create(list(PROMPTS)).cycle(count), 0)
    assert rollout is not None
    return rollout


def bounds_of(rollout: Rollout, **settings: object) -> ValueBounds:
    chosen = {"completions": 3, "bound_states": 400} | settings
    config = TrainConfig(pretrain=ValuePretrainingConfig(**chosen))  # type: ignore[arg-type]
    rewards, normalizer = RewardSet.create(linear_reward), RewardNormalizer.create(1)
    return value_bounds(LinearChain(), rollout, rewards, normalizer, config)


def test_floor_and_ceiling_of_a_linear_chain_are_the_known_ones() -> None:
    rollout = chain_rollout()
    gain, push, noise = moments(rollout.table)
    of_prompts = push[0] ** 2 * torch.tensor([float(prompt) for prompt in PROMPTS]).var(correction=0)
    total = of_prompts + gain[0] ** 2 + noise[0]
    bounds = bounds_of(rollout)
    torch.testing.assert_close(bounds.floor[0], of_prompts / total, rtol=0, atol=0.06)
    torch.testing.assert_close(bounds.ceiling[:, 0], 1 - noise / total, rtol=0, atol=0.06)
    assert bounds.ceiling[-1].item() == 1
    assert bounds.images == 4 * 3 * 400


def test_completions_go_on_from_the_state_with_noise_of_their_own() -> None:
    rollout = chain_rollout(count=8)
    rows = torch.tensor([3, 3, 5])
    own = rollout.noise.sample_ids[rows]
    again = complete(LinearChain(), rollout, 2, rows, own)
    assert torch.equal(again, rollout.clean_latents[rows])
    fresh = complete(LinearChain(), rollout, 2, rows, own + 1000)
    assert not torch.allclose(fresh, again, atol=1e-3)
    # The last step is deterministic.
    assert torch.equal(complete(LinearChain(), rollout, 4, rows, own + 1000), again)


def test_behind_the_noise_all_is_known_and_costs_nothing() -> None:
    rollout = chain_rollout(window=(0, 3))
    bounds = bounds_of(rollout, bound_states=100)
    assert bounds.images == 3 * 3 * 100
    assert bool((bounds.ceiling[:3] < 1).all())
    assert torch.equal(bounds.ceiling[3:], torch.ones(2, 1).double())


def test_the_score_is_zero_at_the_floor_one_at_the_ceiling_and_unknown_where_they_meet() -> None:
    floor, ceiling = torch.tensor([0.2]), torch.tensor([[0.7], [1.0], [0.21]])
    bounds = ValueBounds(floor, ceiling, 0)
    scores = bounds.score(torch.tensor([[0.2], [1.0], [0.2]]))[:, 0]
    torch.testing.assert_close(scores, torch.tensor([0.0, 1.0, torch.nan]), equal_nan=True)
    assert bounds.overall_score(torch.tensor([[0.2], [0.6], [0.2]])) == pytest.approx(0.4 / 1.31)
    assert math.isnan(replace(bounds, ceiling=torch.full((3, 1), 0.21)).overall_score(torch.zeros(3, 1)))


def test_settings_that_measure_nothing_are_refused() -> None:
    rollout = chain_rollout(count=8)
    with Refusal(
        "pretrain.completions=0 completes no state, so there is no ceiling",
        cause="`measure_bounds` without completions.",
        remedy="use at least 2",
    ).raised():
        bounds_of(rollout, completions=0, bound_states=64)
    with pytest.raises(ValueError, match="8 samples in 8 groups"):
        bounds_of(replace(rollout, prompts=[str(row) for row in range(8)]))
