"""Ranks that sample apart from those that learn change nothing but who waits for whom."""

from __future__ import annotations

import os
import signal
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from ranked_runs import GROUPS, PPO, PRETRAINING, SMALL, state
from ranked_runs import trainer_for as tiny_trainer
from ranks import started, together
from refusals import Refusal
from tiny_backbones import brightness
from torch import Tensor, distributed

from lacfast import LatentActorCriticTrainer
from lacfast.config import CriticConfig, LoRAConfig
from lacfast.distributed import LostRankError, World, joined
from lacfast.distributed.messages import Outbox
from lacfast.records import Rollout
from lacfast.rewards.reward import RewardError
from lacfast.rollout.memory import trajectory_bytes

pytestmark = pytest.mark.skipif(not distributed.is_available(), reason="torch is without torch.distributed")
ITERATIONS = 4
ARMS: dict[str, dict[str, Any]] = {
    "staleness 0": {},
    "staleness 1": {"staleness": 1},
    "staleness 2": {"staleness": 2, "lora": LoRAConfig(rank=2)},
    "clean_net, replay, guidance": {
        "staleness": 1,
        "critic": CriticConfig(trunk="clean_net", **SMALL),
        "ppo": replace(PPO, critic_rollouts=2),
        "guidance": 2.0,
    },
    "groups": {"staleness": 2, "advantages": GROUPS, "samples_per_prompt": 4, "ema_decay": 0.5},
    "value pretraining": {"staleness": 1, "pretrain": PRETRAINING, "eval_every": 2},
}
EVERYWHERE = ("staleness 1", "staleness 2")
LAYOUTS = {
    "1 + 1": (1, 1, tuple(ARMS)),
    "2 + 1": (2, 1, EVERYWHERE),
    "1 + 2": (1, 2, EVERYWHERE),
}
"""Ranks that learn, ranks that sample, and the arms that are tried on them."""
Runs = dict[str, dict[str, list[Any]]]


def trainer_for(rollout_ranks: int, **changes: Any) -> LatentActorCriticTrainer:
    return tiny_trainer(rollout_ranks=rollout_ranks, iterations=ITERATIONS, **changes)


def trained(trainer: LatentActorCriticTrainer, iterations: int | None = None) -> dict[str, Any]:
    """What a rank saw of its iterations, and what it leaves."""
    latents: list[Tensor] = []
    metrics: list[dict[str, Any]] = []
    update = trainer.update

    def watched(rollout: Rollout, **options: Any) -> dict[str, Any]:
        latents.append(rollout.latents)
        return update(rollout, **options)

    trainer.update = watched  # type: ignore[method-assign]
    bridge, unsent = trainer.source._bridge, [0]
    if bridge is not None:
        send = bridge.send

        def sending(values: Mapping[int, Any]) -> None:
            send(values)
            unsent.append(len(bridge._outbox))

        bridge.send = sending  # type: ignore[method-assign]
    ran = trainer.train(iterations, on_iteration=metrics.append)
    found = state(trainer) | {
        "latents": latents,
        "metrics": metrics,
        "ran": ran,
        "images": trainer.images,
        "iteration": trainer.iteration,
        "unsent": max(unsent),
    }
    trainer.close()
    return found


def runs(rollout_ranks: int, arms: Sequence[str]) -> dict[str, Any]:
    found = {}
    for arm in arms:
        trainer = trainer_for(rollout_ranks, **ARMS[arm])
        if "pretrain" in ARMS[arm]:
            trainer.pretrain_critic()
        found[arm] = trained(trainer)
    return found


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    return runs(0, tuple(ARMS))


def saved(directory: Path) -> None:
    """Stop by an error behind the second iteration, as a run does that a signal ends."""
    for arm in EVERYWHERE:
        trainer = trainer_for(1, **ARMS[arm])

        def stop(metrics: dict[str, Any], arm: str = arm, trainer: Any = trainer) -> None:
            if metrics["iteration"] == 2 and not trainer.source.is_server:
                trainer.save(directory / arm)
                raise InterruptedError

        with suppress(InterruptedError):
            trainer.train(on_iteration=stop)
        trainer.close()


def resumed(directory: Path, rollout_ranks: int) -> dict[str, Any]:
    found = {}
    for arm in EVERYWHERE:
        trainer = trainer_for(rollout_ranks, **ARMS[arm])
        trainer.load(directory / arm)
        found[arm] = trained(trainer)
    return found


def failing_once(images: Tensor, prompts: list[str], metadata: list[dict[str, object]]) -> Tensor:
    """A reward that fails on one of the ranks that sample, in its second rollout."""
    failing_once.calls = getattr(failing_once, "calls", 0) + 1  # type: ignore[attr-defined]
    if World.current().rank == 2 and failing_once.calls == 2:  # type: ignore[attr-defined]
        raise OSError("the server is gone")
    return brightness(images, prompts, metadata)


def failed(policy: str) -> list[Any]:
    """What a rank sees of two rollout ranks of which one fails, by TrainConfig.on_reward_error."""
    failing_once.calls = 0  # type: ignore[attr-defined]
    changes = {"rollout_batch_size": 0, "on_reward_error": policy, "staleness": 1}
    trainer = trainer_for(2, rewards=[failing_once], **changes)
    seen: list[Any] = []
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer.train(on_iteration=lambda metrics: seen.append(metrics.get("skipped", False)))
    except RewardError as error:
        seen.append(str(error))
    trainer.close()
    return seen


def refused(rollout_ranks: int) -> str:
    """The message of a trainer that cannot be."""
    with pytest.raises(ValueError, match="rollout_ranks=") as caught:
        trainer_for(rollout_ranks)
    return str(caught.value)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def apart(checkpoints: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """What the ranks of every layout do, in one group of processes each."""
    further: dict[str, dict[str, Callable[[], Any]]] = {
        "1 + 1": {"saved": partial(saved, checkpoints), "refused": partial(refused, 2)},
        "2 + 1": {},
        "1 + 2": {
            "resumed": partial(resumed, checkpoints, 2),
            **{policy: partial(failed, policy) for policy in ("skip", "raise")},
        },
    }
    return {
        layout: together(
            learners + samplers,
            {"trained": partial(runs, samplers, arms), **further[layout]},
            tmp_path_factory.mktemp("apart"),
        )
        for layout, (learners, samplers, arms) in LAYOUTS.items()
    }


@pytest.mark.parametrize(
    ("layout", "arm"), [(layout, arm) for layout, (_, _, arms) in LAYOUTS.items() for arm in arms]
)
def test_a_run_does_not_depend_on_who_samples(
    arm: str, layout: str, alone: dict[str, Any], apart: Runs
) -> None:
    learners, _, _ = LAYOUTS[layout]
    found = [rank[arm] for rank in apart[layout]["trained"]]
    expected, ranks, samplers = alone[arm], found[:learners], found[learners:]
    assert all(sampler["ran"] == ITERATIONS for sampler in samplers)
    for number, latents in enumerate(expected["latents"]):
        found = torch.cat([rank["latents"][number] for rank in ranks], dim=1)
        # Behind the first update weights differ by the order of sums.
        seen = max(number - ARMS[arm].get("staleness", 0), 0)
        torch.testing.assert_close(found, latents, rtol=0, atol=1e-5 if seen else 0)
    for rank in ranks:
        for kind, close in (("policy", 1e-6), ("critic", 2e-5)):
            torch.testing.assert_close(rank[kind], expected[kind], rtol=0, atol=close)
            assert all(map(torch.equal, rank[kind], ranks[0][kind]))
        assert (rank["images"], rank["iteration"]) == (expected["images"], ITERATIONS)
        for found, metrics in zip(rank["metrics"], expected["metrics"], strict=True):
            for name in ("reward/brightness", "first_max_abs_log_ratio"):
                assert found[name] == pytest.approx(metrics[name], rel=1e-3, abs=1e-6)
            if "value_mean" in metrics:
                torch.testing.assert_close(found["value_mean"], metrics["value_mean"], rtol=0, atol=1e-5)


def test_who_waits_and_what_is_sent_is_logged(apart: Runs) -> None:
    metrics = apart["1 + 1"]["trained"][0]["staleness 2"]["metrics"]
    assert [found["staleness"] for found in metrics] == [0, 1, 2, 2]
    # Three rollouts by the first weights, the last by those behind the first update.
    sent = [found["weight_bytes"] > 1000 for found in metrics]
    assert sent == [True, True, False, False]
    trainer = trainer_for(0, **ARMS["staleness 2"])
    rollout = trainer.next_rollout()
    assert rollout is not None
    assert metrics[0]["rollout_bytes"] == trajectory_bytes(rollout) * 8 - rollout.values.nbytes
    assert all(found["seconds_learners_waited"] >= 0 for found in metrics)
    assert all(found["seconds_rollout_ranks_waited"] >= 0 for found in metrics)


def test_a_rollout_that_has_arrived_is_let_go(apart: Runs) -> None:
    for layout, (learners, _, arms) in LAYOUTS.items():
        for arm in arms:
            kept = [rank[arm]["unsent"] for rank in apart[layout]["trained"]]
            limit = ARMS[arm].get("staleness", 0) + 1
            assert limit < ITERATIONS
            assert kept[:learners] == [0] * learners
            assert all(0 < count <= limit for count in kept[learners:])


def test_what_could_not_be_sent_is_no_thing_that_has_arrived() -> None:
    class Lost:
        """As gloo's work: done, and what it did is told to who waits."""

        def is_completed(self) -> bool:
            return True

        def wait(self) -> None:
            raise RuntimeError("Connection closed by peer")

    outbox = Outbox()
    outbox.keep([(Lost(), torch.zeros(1))])
    outbox.wait(but=1)
    with pytest.raises(RuntimeError, match="closed by peer"):
        outbox.wait()
    assert len(outbox) == 1


def test_a_run_goes_on_on_other_ranks_while_rollouts_were_under_way(
    checkpoints: Path, alone: dict[str, Any], apart: Runs
) -> None:
    here, ranks = resumed(checkpoints, 0), apart["1 + 2"]["resumed"]
    for arm in EVERYWHERE:
        for found in (here[arm], ranks[0][arm]):
            assert found["ran"] == ITERATIONS - 2
            for latents, known in zip(found["latents"], alone[arm]["latents"][2:], strict=True):
                torch.testing.assert_close(latents, known, rtol=0, atol=1e-5)
            torch.testing.assert_close(found["policy"], alone[arm]["policy"], rtol=0, atol=1e-6)


def test_a_run_that_is_killed_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    changes = ARMS["staleness 1"]

    def trained_on(directory: Path, killed_at: int) -> Callable[[], dict[str, Any]]:
        def work() -> dict[str, Any]:
            torch.set_num_threads(1)
            with joined(timedelta(seconds=20)):
                trainer = trainer_for(1, **changes)
                if directory.exists():
                    trainer.load(directory)

                def after(metrics: dict[str, Any]) -> None:
                    if not trainer.source.is_server:
                        trainer.save(directory)
                    elif metrics["iteration"] == killed_at:
                        os.kill(os.getpid(), signal.SIGKILL)

                try:
                    trainer.train(on_iteration=after)
                except LostRankError as error:
                    return {"error": str(error)}
                finally:
                    trainer.close()
                return state(trainer)

        return work

    def run(name: str, killed_at: int) -> dict[str, Any]:
        ranks, _store = started(2, trained_on(tmp_path / name, killed_at), tmp_path)
        for process in ranks:
            process.join(timeout=60)
        assert [process.exitcode for process in ranks] == [0, -signal.SIGKILL if killed_at else 0]
        found: dict[str, Any] = torch.load(tmp_path / "0.pt", weights_only=False)
        return found

    expected = run("through", 0)
    lost = run("killed", 3)["error"]
    assert "rank 0 waited for the others at the rollout of iteration" in lost
    found = run("killed", 0)
    assert all(map(torch.equal, found["policy"], expected["policy"]))
    assert all(map(torch.equal, found["critic"], expected["critic"]))


@pytest.mark.parametrize("policy", ["skip", "raise"])
def test_a_reward_that_fails_where_others_sample_is_met_by_those_that_learn(policy: str, apart: Runs) -> None:
    learner, *samplers = apart["1 + 2"][policy]
    if policy == "skip":
        assert learner == [False, True, False, False]
        assert samplers == [[False] * ITERATIONS] * 2
    else:
        assert learner[0] is False
        assert "the server is gone" in learner[1]
        # The rollout behind it was under way already.
        assert samplers == [[False] * 3] * 2


def test_rollout_ranks_leave_one_that_learns(apart: Runs) -> None:
    refusal = Refusal(
        "rollout_ranks=2 of 2 leave no rank that learns",
        cause="As many rollout ranks as processes, or a run without torchrun.",
        remedy="start at least 3 processes with torchrun",
    )
    for message in apart["1 + 1"]["refused"]:
        refusal.check(message)
    assert refused(1).startswith("rollout_ranks=1 of 1")
