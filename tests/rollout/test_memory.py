"""A rollout's memory is allocated once, its parts write into it, and the host is asked before that fills."""

from __future__ import annotations

import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
from refusals import Refusal
from tiny_backbones import PROMPTS, brightness, tiny_backbone, tiny_config
from torch import Tensor

from lacfast import LatentActorCriticTrainer
from lacfast.learning.value_pretraining import host_room
from lacfast.prompts import PromptSet
from lacfast.records import Rollout
from lacfast.rollout import memory
from lacfast.rollout.memory import HostRoom, RolloutMemory, trajectory_bytes


def trainer(**settings: Any) -> LatentActorCriticTrainer:
    config = tiny_config(batch_size=4, rollout_batch_size=2, **settings)
    return LatentActorCriticTrainer(tiny_backbone("dit"), brightness, PROMPTS, config)


def parts() -> list[Rollout]:
    made = trainer()
    return [made.rollout(PromptSet.create(PROMPTS).cycle(2), first) for first in (0, 2)]


def test_parts_lie_where_the_whole_does() -> None:
    first, second = parts()
    held = RolloutMemory(4)
    written = [held.add(part) for part in (first, second)]
    whole = held.rollout()
    assert torch.equal(whole.latents, torch.cat([first.latents, second.latents], dim=1))
    for name, features in whole.features.items():
        assert torch.equal(features, torch.cat([first.features[name], second.features[name]], dim=1))
    assert whole.noise.sample_ids.tolist() == [0, 1, 2, 3]
    assert whole.prompts == first.prompts + second.prompts
    storage = whole.latents.untyped_storage().data_ptr()
    assert {part.clean_latents.untyped_storage().data_ptr() for part in written} == {storage}


def test_a_part_that_is_the_whole_is_not_copied() -> None:
    (part, _) = parts()
    held = RolloutMemory(2)
    held.add(part)
    assert held.rollout().latents is part.latents


def test_a_rollout_of_several_versions_is_of_none() -> None:
    first, second = parts()
    versions = (replace(first, policy_version=1), replace(second, policy_version=2))
    assert RolloutMemory.of(versions, 4).policy_version is None
    assert RolloutMemory.of((versions[0], replace(second, policy_version=1)), 4).policy_version == 1


def test_no_part_is_kept_while_the_next_is_sampled() -> None:
    """All of them beside their joined copy would be the rollout twice."""
    made, alive = trainer(), []
    seen: list[weakref.ref[Tensor]] = []
    sample = made.rollout_sampler.sample

    def watched(*arguments: Any, **named: Any) -> Rollout:
        alive.append(sum(part() is not None for part in seen))
        rollout = sample(*arguments, **named)
        seen.extend(weakref.ref(tensor) for tensor in rollout.features.values())
        return rollout

    made.rollout_sampler.sample = watched  # type: ignore[method-assign]
    made.collect(PromptSet.create(PROMPTS).cycle(6), 0)
    assert alive == [0, 0, 0]


def test_the_last_rollout_is_released_before_the_next_one_is_sampled() -> None:
    made, alive = trainer(), []
    seen: list[weakref.ref[Tensor]] = []
    sample = made.rollout_sampler.sample

    def watched(*arguments: Any, **named: Any) -> Rollout:
        alive.append(sum(rollout() is not None for rollout in seen))
        return sample(*arguments, **named)

    made.rollout_sampler.sample = watched  # type: ignore[method-assign]
    for _ in range(2):
        made.train_iteration()
        assert made.last_rollout is not None
        seen.append(weakref.ref(made.last_rollout.latents))
    assert alive == [0] * 4


def test_the_host_is_asked_before_value_pretraining_fills_it(monkeypatch: pytest.MonkeyPatch) -> None:
    made = trainer()
    rollout = made.rollout(PromptSet.create(PROMPTS).cycle(2), 0)
    room = host_room(made.config)
    needed = trajectory_bytes(rollout) * room.trajectories
    monkeypatch.setattr(memory, "free_host_bytes", lambda: needed)
    with Refusal(
        "trajectories of",
        cause="The host has too little memory for the rollouts that value pretraining keeps.",
        remedy="lower pretrain.kept_rollouts=15 or pretrain.held_out_samples=",
    ).raised():
        made.pretrain_critic()
    assert made.images == 0
    monkeypatch.setattr(memory, "free_host_bytes", lambda: 2 * needed)
    made.pretrain_critic()


def test_room_is_granted_once() -> None:
    """What is granted fills up, so the same question later would have another answer."""
    room = HostRoom(1, "lower it", is_granted=True)
    room.require(1 << 60)
