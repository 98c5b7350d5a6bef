"""What fails on one rank ends all of them with one message, or is left out by all."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import started, together
from refusals import Refusal
from tiny_backbones import PROMPTS, brightness, tiny_backbone, tiny_config
from torch import distributed

from lacfast import LatentActorCriticTrainer
from lacfast.config import SamplerConfig
from lacfast.distributed import LostRankError, ToldElsewhereError, World, joined
from lacfast.distributed.world import TELL_SECONDS
from lacfast.rewards.reward import RewardError
from lacfast.runs.endings import ending

pytestmark = pytest.mark.skipif(not distributed.is_available(), reason="torch is without torch.distributed")
TIMEOUT = timedelta(seconds=3)


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


def skipped() -> dict[str, Any]:
    trainer = trainer_with(on_second_rank(fail), on_reward_error="skip")
    with pytest.warns(UserWarning, match=r"skipped.*the server is gone"):
        metrics = trainer.train_iteration()
    return {name: metrics[name] for name in ("skipped", "iteration", "images")}


def raised() -> str:
    with pytest.raises(RewardError) as caught:
        trainer_with(on_second_rank(fail)).train_iteration()
    return str(caught.value)


def bad() -> dict[str, Any]:
    trainer = trainer_with(brightness)
    before = [parameter.detach().clone() for parameter in trainer.backbone.policy_parameters()]
    if trainer.world.rank == 1:
        trainer.backbone.policy_parameters()[0].register_hook(lambda gradient: gradient * torch.nan)
    metrics = trainer.train_iteration()
    after = trainer.backbone.policy_parameters()
    return {"bad": metrics["bad_gradients/policy"], "same": all(map(torch.equal, before, after))}


def halved(limits: tuple[int, int]) -> dict[str, Any]:
    """Weights after an iteration and the largest microbatch, where each rank has memory for so many pairs."""
    trainer = trainer_with(brightness)
    gradient, limit = trainer.learner.policy_update.gradient, limits[trainer.world.rank]
    sizes: list[int] = []

    def limited(batch: Any) -> None:
        if len(batch.steps) > limit:
            raise torch.OutOfMemoryError("no memory")
        sizes.append(len(batch.steps))
        gradient(batch)

    trainer.learner.policy_update.gradient = limited  # type: ignore[method-assign]
    trainer.train_iteration()
    weights = [parameter.detach() for parameter in trainer.backbone.policy_parameters()]
    return {"weights": weights, "largest": max(sizes)}


def without_share() -> str:
    """The message of an update on a rollout that lost its share, as one that was built by hand."""
    trainer = trainer_with(brightness)
    rollout = trainer.next_rollout()
    assert rollout is not None
    with pytest.raises(ValueError, match="share of 1"):
        trainer.update(replace(rollout, share=replace(rollout.share, count=1)))
    with pytest.raises(ValueError, match="no share") as caught:
        trainer.update(replace(rollout, share=None))
    return str(caught.value)


WORKS: dict[str, Callable[[], Any]] = {
    "skip": skipped,
    "raise": raised,
    "bad": bad,
    "roomy": partial(halved, (100, 100)),
    "halved": partial(halved, (100, 1)),
    "without share": without_share,
}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    """What two ranks make of each failure of the second."""
    return together(2, WORKS, tmp_path_factory.mktemp("ranks"))


def test_a_rollout_whose_reward_fails_on_one_rank_is_skipped_by_all(found: dict[str, list[Any]]) -> None:
    assert found["skip"] == [{"skipped": True, "iteration": 1, "images": 8}] * 2


def test_a_reward_that_fails_on_one_rank_ends_all_by_the_same_error(found: dict[str, list[Any]]) -> None:
    first, second = found["raise"]
    assert first == second
    assert "the server is gone" in first


def test_a_gradient_that_is_not_finite_on_one_rank_is_left_out_by_all(found: dict[str, list[Any]]) -> None:
    assert found["bad"] == [{"bad": 2, "same": True}] * 2


def test_a_rank_that_runs_out_of_memory_halves_its_microbatches_alone(found: dict[str, list[Any]]) -> None:
    (first, second), roomy = found["halved"], found["roomy"][0]
    assert second["largest"] == 1 < first["largest"] == roomy["largest"]
    assert all(map(torch.equal, first["weights"], second["weights"]))
    torch.testing.assert_close(first["weights"], roomy["weights"], rtol=0, atol=1e-6)


def test_a_rollout_that_knows_no_share_is_refused(found: dict[str, list[Any]]) -> None:
    refusal = Refusal(
        "a rollout of 4 trajectories has no share of the batch that 2 ranks have together",
        cause="A rollout that was built by hand is learned from on several ranks.",
        remedy="take what trainer.rollout or trainer.collect returns",
    )
    for message in found["without share"]:
        refusal.check(message)


def _ended(reward: Any, prepare: Callable[[LatentActorCriticTrainer], object] = id) -> dict[str, Any]:
    """How a rank that trains with this reward ends, as the command line would tell it."""
    start = time.monotonic()
    try:
        with joined(TIMEOUT):
            trainer = trainer_with(reward)
            prepare(trainer)
            trainer.train_iteration()
    except Exception as error:
        told = ending(error)
        assert told is not None
        end = time.monotonic()
        return {"error": type(error), "line": told.line, "seconds": end - start, "end": end}
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
    # torchrun ends all where one ends, also one that is about to tell.
    assert second["end"] - first["end"] > TELL_SECONDS / 2


def _starved(trainer: LatentActorCriticTrainer) -> None:
    """Let the second rank run out of memory where all step with the gradients of all."""
    optimizer = trainer.learner.policy_update.optimizer

    def step() -> None:
        raise torch.OutOfMemoryError("no memory for the moments")

    if trainer.world.rank == 1:
        optimizer.step = step  # type: ignore[method-assign]


def test_a_rank_without_memory_for_its_optimizer_step_ends_all_with_one_message(tmp_path: Path) -> None:
    ranks, _store = started(2, lambda: _ended(brightness, _starved), tmp_path)
    for process in ranks:
        process.join(timeout=60)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(2))
    refusal = Refusal(
        "rank 1 ran out of memory at the optimizer step of the policy",
        cause="One of several ranks has no memory left when the gradients of all are summed.",
        remedy="lower ppo.microbatch_size",
    )
    refusal.check(second["line"])
    assert first["error"] is ToldElsewhereError
    assert first["line"] == ""
    assert max(first["seconds"], second["seconds"]) < 40


def test_the_first_rank_alone_tells_where_it_holds_the_store(tmp_path: Path) -> None:
    def refused() -> type[BaseException]:
        try:
            with joined(TIMEOUT):
                raise ValueError("refused")
        except Exception as error:
            return type(error)

    ranks, _store = started(2, refused, tmp_path, has_agent=False)
    for process in ranks:
        process.join(timeout=60)
    told = [torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(2)]
    assert told == [ValueError, ToldElsewhereError]


def test_a_rank_that_leaves_at_once_does_not_break_the_joining_of_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second joins late: without a meeting, the first would be gone by then."""
    join = distributed.init_process_group

    def late(*arguments: Any, rank: int, **keywords: Any) -> None:
        join(*arguments, rank=rank, **keywords)
        time.sleep(rank * 0.5)

    def left() -> float:
        with joined(TIMEOUT):
            return time.time()

    monkeypatch.setattr(distributed, "init_process_group", late)
    ranks, _store = started(2, left, tmp_path)
    for process in ranks:
        process.join(timeout=60)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(2))
    assert abs(first - second) < 0.4
