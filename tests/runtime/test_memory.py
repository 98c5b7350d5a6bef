"""The size of a microbatch fits the memory, gives way when it does not, and changes no result."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import assert_same_step
from tiny_backbones import PROMPTS, brightness, tiny_backbone, tiny_config

from lacfast import LatentActorCriticTrainer
from lacfast.config import PPOConfig, Ratio
from lacfast.learning.batches import PolicyBatch
from lacfast.runtime import memory as microbatch
from lacfast.runtime.memory import HOST_LIMIT, PROBES, MicrobatchSize

AUTO = PPOConfig(clip=Ratio(1e-3), num_minibatches=2, adam_eps=1e-4)
CPU = torch.device("cpu")


def trainer_for(ppo: PPOConfig, **changes: Any) -> LatentActorCriticTrainer:
    return LatentActorCriticTrainer(
        tiny_backbone("dit"), brightness, PROMPTS, tiny_config(ppo=ppo, **changes)
    )


def with_free_memory(monkeypatch: pytest.MonkeyPatch, free: int, fixed: int, per_pair: int) -> None:
    measured = [fixed + pairs * per_pair for pairs in PROBES]
    monkeypatch.setattr(microbatch, "_host_bytes", lambda probe, device: (free, measured))


@pytest.mark.parametrize(
    ("free", "expected"), [(10_000, HOST_LIMIT), (1_199, 128), (300, 16), (150, 1), (0, 1)]
)
def test_the_largest_power_of_two_that_fits_is_chosen(
    free: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_free_memory(monkeypatch, free, fixed=100, per_pair=5)
    size = MicrobatchSize(0)
    size.find(lambda count: None, CPU, reserved=50)
    assert size.size == expected
    size.find(lambda count: pytest.fail("it is known already"), CPU, reserved=0)


def test_a_pair_s_activations_are_measured() -> None:
    weight = torch.nn.Parameter(torch.randn(64, 64))

    def probe(count: int) -> None:
        (torch.ones(count, 64) @ weight).exp().sum().backward()

    free, (small, large) = microbatch._host_bytes(probe, CPU)
    # The input of the product and the result of exp; the weight is in both.
    assert (large - small) // 2 == 2 * 64 * 4
    assert free > 0


def test_the_probe_leaves_no_trace() -> None:
    found, given = trainer_for(AUTO), trainer_for(PPOConfig(**{**vars(AUTO), "microbatch_size": HOST_LIMIT}))
    first, second = found.train_iteration(), given.train_iteration()
    assert [update.microbatch.size for update in found.learner.updates] == [HOST_LIMIT, HOST_LIMIT]
    for name in ("policy_loss", "value_loss", "policy_grad_norm", "critic_grad_norm"):
        assert first[name] == second[name], name


@pytest.mark.isa
def test_running_out_of_memory_halves_the_size_and_leaves_the_result(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain, short = trainer_for(AUTO), trainer_for(AUTO)
    before = copy.deepcopy(plain.backbone.model.state_dict())
    plain.train_iteration()
    gradient = short.learner.policy_update.gradient

    def limited(batch: PolicyBatch) -> None:
        # The error comes after the gradients of this microbatch are in.
        gradient(batch)
        if len(batch.steps) > 5:
            raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(short.learner.policy_update, "gradient", limited)
    with pytest.warns(RuntimeWarning, match=r"out of memory with \d+ pairs.*Set ppo.microbatch_size=3"):
        metrics = short.train_iteration()
    assert [update.microbatch.size for update in short.learner.updates] == [3, HOST_LIMIT]
    assert metrics["first_max_abs_log_ratio"] < 1e-6
    assert_same_step(short.backbone.model.state_dict(), plain.backbone.model.state_dict(), before)


def test_a_single_pair_that_does_not_fit_is_an_error() -> None:
    def step(size: int) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError), pytest.warns(RuntimeWarning, match="out of memory with 4"):
        MicrobatchSize(512).run(step, 4)


def test_a_resumed_run_keeps_the_size_that_was_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, resumed = trainer_for(AUTO), trainer_for(AUTO)
    # The moments of a tiny model are nothing beside a pair of this size.
    with_free_memory(monkeypatch, 5 << 40, fixed=0, per_pair=1 << 40)
    first.train_iteration()
    first.save(tmp_path / "run")
    monkeypatch.undo()
    resumed.load(tmp_path / "run")
    resumed.train_iteration()
    assert resumed.learner.policy_update.microbatch.size == first.learner.policy_update.microbatch.size == 4
