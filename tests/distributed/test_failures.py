"""What fails on one rank ends all of them with one message, or is left out by all."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import on_ranks, started
from tiny_backbones import PROMPTS, brightness, tiny_backbone, tiny_config
from torch import distributed

from lacfast import LatentActorCriticTrainer
from lacfast.config import SamplerConfig
from lacfast.distributed import LostRankError, ToldElsewhereError, World, joined
from lacfast.rewards.reward import RewardError
from lacfast.runs.endings import ending

pytestmark = pytest.mark.skipif(not distributed.is_available(), reason="torch is without torch.distributed")
TIMEOUT = timedelta(seconds=4)


def trainer_with(reward: Any, **changes: Any) -> LatentActorCriticTrainer:
    settings = {"sampler": SamplerConfig(num_steps=2), **changes}
    return LatentActorCriticTrainer(tiny_backbone("dit"), reward, PROMPTS, tiny_config(**settings))


def on_second_rank(work: Callable[[], Any]) -> Any:
    """A reward that does `work` first, on the second rank alone."""

    def flaky(images: torch.Tensor, prompts: list[str], metadata: list[dict[str, object]]) -> torch.Tensor:
        if World.current().rank == 1:
            work()
        return brightness(images, prompts, metadata)

    return flaky


def fail() -> None:
    raise OSError("the server is gone")


def test_a_rollout_whose_reward_fails_on_one_rank_is_skipped_by_all(tmp_path: Path) -> None:
    def work() -> dict[str, Any]:
        trainer = trainer_with(on_second_rank(fail), on_reward_error="skip")
        with pytest.warns(UserWarning, match=r"skipped.*the server is gone"):
            metrics = trainer.train_iteration()
        return {name: metrics[name] for name in ("skipped", "iteration", "images")}

    assert on_ranks(2, work, tmp_path) == [{"skipped": True, "iteration": 1, "images": 8}] * 2


def test_a_reward_that_fails_on_one_rank_ends_all_by_the_same_error(tmp_path: Path) -> None:
    def work() -> str:
        with pytest.raises(RewardError) as caught:
            trainer_with(on_second_rank(fail)).train_iteration()
        return str(caught.value)

    first, second = on_ranks(2, work, tmp_path)
    assert first == second
    assert "the server is gone" in first


def test_a_gradient_that_is_not_finite_on_one_rank_is_left_out_by_all(tmp_path: Path) -> None:
    def work() -> dict[str, Any]:
        trainer = trainer_with(brightness)
        before = [parameter.detach().clone() for parameter in trainer.backbone.policy_parameters()]
        if trainer.world.rank == 1:
            trainer.backbone.policy_parameters()[0].register_hook(lambda gradient: gradient * torch.nan)
        metrics = trainer.train_iteration()
        after = trainer.backbone.policy_parameters()
        return {"bad": metrics["bad_gradients/policy"], "same": all(map(torch.equal, before, after))}

    assert on_ranks(2, work, tmp_path) == [{"bad": 2, "same": True}] * 2


def test_a_rank_that_runs_out_of_memory_halves_its_microbatches_alone(tmp_path: Path) -> None:
    def work() -> list[torch.Tensor]:
        trainer = trainer_with(brightness)
        if trainer.world.rank == 1:
            gradient = trainer.learner.policy_update.gradient

            def limited(batch: Any) -> None:
                if len(batch.steps) > 2:
                    raise torch.OutOfMemoryError("no memory")
                gradient(batch)

            trainer.learner.policy_update.gradient = limited  # type: ignore[method-assign]
        trainer.train_iteration()
        return [parameter.detach() for parameter in trainer.backbone.policy_parameters()]

    first, second = on_ranks(2, work, tmp_path)
    assert all(map(torch.equal, first, second))


def _ended(reward: Any) -> dict[str, Any]:
    """How a rank that trains with this reward ends, as the command line would tell it."""
    start = time.monotonic()
    try:
        with joined(TIMEOUT):
            trainer_with(reward).train_iteration()
    except Exception as error:
        told = ending(error)
        assert told is not None
        return {"error": type(error), "line": told.line, "seconds": time.monotonic() - start}
    return {}


@pytest.mark.parametrize(
    "work", [lambda: time.sleep(60), lambda: os.kill(os.getpid(), signal.SIGKILL)], ids=["hangs", "is killed"]
)
def test_a_rank_that_never_comes_is_named(work: Callable[[], None], tmp_path: Path) -> None:
    ranks, _store = started(2, lambda: _ended(on_second_rank(work)), tmp_path)
    ranks[0].join(timeout=60)
    ranks[1].kill()
    assert ranks[0].exitcode == 0
    found = torch.load(tmp_path / "0.pt", weights_only=False)
    assert found["error"] is LostRankError
    assert "rank 0 waited for the others at the rewards of the rollout" in found["line"]
    assert "rank 1 was last at" in found["line"]
    assert found["seconds"] < 40


def test_what_all_ranks_say_is_told_by_the_first_alone(tmp_path: Path) -> None:
    ranks, _store = started(2, lambda: _ended(on_second_rank(fail)), tmp_path)
    for process in ranks:
        process.join(timeout=60)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(2))
    assert first["error"] is RewardError
    assert "the server is gone" in first["line"]
    assert second["error"] is ToldElsewhereError
    assert second["line"] == ""
