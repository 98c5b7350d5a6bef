"""Weights in parts on several ranks train as whole ones do, and are saved for any number of ranks."""

from __future__ import annotations

import io
from collections.abc import Callable
from contextlib import redirect_stderr
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from ranked_runs import ARMS, CRITIC_ROUNDING, PPO, PRETRAINING, SMALL, state, trained, trainer_for
from ranks import on_ranks, started
from refusals import Refusal
from torch import distributed

from lacfast.backbones import load_backbone
from lacfast.cli import main
from lacfast.config import CriticConfig, GraphConfig
from lacfast.distributed.sharding import gathered, is_sharded, own_part
from lacfast.runs.costs import count
from lacfast.runs.endings import USAGE
from lacfast.runs.scaling import scaling
from lacfast.runs.shards import Shards

pytestmark = pytest.mark.skipif(not distributed.is_available(), reason="torch is without torch.distributed")
Runs = dict[int, list[dict[str, Any]]]
UNEVEN = {"batch_size": 7, "samples_per_prompt": 1}
SHARDED: dict[str, dict[str, Any]] = {
    **{name: ARMS[name] for name in ("branch", "lora", "shared", "clean_net", "kl", "value pretraining")},
    "copy": {"critic": CriticConfig(trunk="copy", **SMALL)},
    "on the policy's features": {"critic": CriticConfig(trunk="branch", keep_features=False, **SMALL)},
    "uneven": UNEVEN,
    "uneven replay": UNEVEN | {"ppo": replace(PPO, critic_rollouts=2, num_minibatches=4)},
    "scattered": {"gradient_checkpointing": True, "ema_decay": 0.5},
}
OF_FOUR = ("branch", "lora", "scattered")
"""Arms that are tried with two parts on four ranks too."""


def work(arms: dict[str, dict[str, Any]], shard: int) -> Callable[[], Any]:
    def settings(name: str) -> dict[str, Any]:
        scatters = {"shard_gradients": True} if shard > 1 and name == "scattered" else {}
        return arms[name] | {"shard": shard} | scatters

    return lambda: trained({name: settings(name) for name in arms})


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Every arm alone, and on two and four ranks with two parts."""
    arms = {1: SHARDED, 2: SHARDED, 4: {name: SHARDED[name] for name in OF_FOUR}}
    return {
        size: on_ranks(size, work(arms[size], min(size, 2)), tmp_path_factory.mktemp(f"ranks{size}"))
        for size in arms
    }


@pytest.mark.parametrize(("arm", "size"), [*((arm, 2) for arm in SHARDED), *((arm, 4) for arm in OF_FOUR)])
def test_a_run_does_not_depend_on_shards(arm: str, size: int, runs: Runs) -> None:
    alone, ranks = runs[1][0][arm], [found[arm] for found in runs[size]]
    assert torch.equal(torch.cat([found["ids"] for found in ranks]), alone["ids"])
    assert torch.equal(torch.cat([found["latents"] for found in ranks], dim=1), alone["latents"])
    for found in ranks:
        for kind, close in (("policy", 1e-6), ("critic", CRITIC_ROUNDING.get(arm, 2e-5))):
            torch.testing.assert_close(found[kind], alone[kind], rtol=0, atol=close)
            assert all(map(torch.equal, found[kind], ranks[0][kind]))
        assert found["rewards"] == pytest.approx(alone["rewards"], abs=1e-6)
        assert found["history"] == pytest.approx(alone["history"], abs=1e-5)
        assert found["evaluation"] == pytest.approx(alone["evaluation"], abs=1e-6)
    torch.testing.assert_close(ranks[0]["images"], alone["images"], rtol=0, atol=1e-4)


def resumed(checkpoint: Path, **changes: Any) -> dict[str, Any]:
    trainer, rollouts = trainer_for(**changes), []
    trainer.load(checkpoint)
    trainer.train_iteration(rollouts.append)
    return state(trainer) | {"latents": rollouts[0].latents, "means": trainer.evaluate(samples=6).means()}


def assert_same_run(ranks: list[dict[str, Any]], alone: dict[str, Any]) -> None:
    assert torch.equal(torch.cat([found["latents"] for found in ranks], dim=1), alone["latents"])
    torch.testing.assert_close(ranks[0]["policy"], alone["policy"], rtol=0, atol=1e-6)
    torch.testing.assert_close(ranks[0]["critic"], alone["critic"], rtol=0, atol=2e-5)
    assert ranks[0]["means"] == pytest.approx(alone["means"], abs=1e-6)


AVERAGED = {"ema_decay": 0.5}


def saved(checkpoint: Path, shard: int) -> Callable[[], None]:
    def save() -> None:
        trainer = trainer_for(**AVERAGED, shard=shard)
        trainer.train_iteration()
        trainer.save(checkpoint)

    return save


def test_a_sharded_run_goes_on_with_any_number_of_ranks_and_shards(tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint"
    on_ranks(4, saved(checkpoint, 2), tmp_path / "4")
    alone = resumed(checkpoint, **AVERAGED)
    for size, shard in ((2, 1), (2, 2)):
        ranks = on_ranks(
            size,
            lambda shard=shard: resumed(checkpoint, **AVERAGED, shard=shard),
            tmp_path / f"{size} {shard}",
        )
        assert_same_run(ranks, alone)
    assert load_backbone(checkpoint).critic is not None


def test_a_run_with_whole_weights_goes_on_sharded(tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint"
    saved(checkpoint, 1)()
    ranks = on_ranks(2, lambda: resumed(checkpoint, **AVERAGED, shard=2), tmp_path / "2")
    assert_same_run(ranks, resumed(checkpoint, **AVERAGED))


def test_value_pretraining_goes_on_sharded_and_whole(tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint"

    def begun() -> None:
        trainer = trainer_for(pretrain=PRETRAINING, shard=2)

        def stop(*_: Any) -> None:
            trainer.save(checkpoint)
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            trainer.pretrain_critic(stop)

    def ended(shard: int) -> list[float]:
        trainer = trainer_for(pretrain=PRETRAINING, shard=shard)
        trainer.load(checkpoint)
        return trainer.pretrain_critic().history

    on_ranks(2, begun, tmp_path / "begun")
    alone = ended(1)
    assert len(alone) == 2
    for found in on_ranks(2, lambda: ended(2), tmp_path / "ended"):
        assert found == pytest.approx(alone, abs=1e-5)


def test_a_rank_has_its_part_of_weights_gradients_and_moments(tmp_path: Path) -> None:
    def parts() -> tuple[int, int]:
        trainer = trainer_for(shard=2)
        trainer.train_iteration()
        optimizer = trainer.learner.policy_update.optimizer
        weights = trainer.backbone.policy_parameters()
        assert all(map(is_sharded, weights))
        kept = [*weights, *(each["exp_avg"] for each in optimizer.state.values())]
        return sum(own_part(each).numel() for each in kept), sum(each.numel() for each in kept)

    first, second = on_ranks(2, parts, tmp_path)
    assert first[1] == second[1] == first[0] + second[0]
    # An odd row makes the first rank's part a little larger.
    assert first[0] / first[1] < 0.52


def test_within_gathered_a_rank_may_run_alone(tmp_path: Path) -> None:
    def forwards() -> int:
        trainer = trainer_for(shard=2)
        backbone = trainer.backbone
        sample, prompts = torch.zeros(1, *backbone.latent_shape), backbone.encode_unconditional(1)
        with gathered(backbone.model), torch.no_grad():
            sent = trainer.world.traffic.num_bytes
            for _ in range(3 * trainer.world.rank):
                backbone.predict(sample, torch.ones(1), prompts)
            return int(trainer.world.traffic.num_bytes - sent)

    assert on_ranks(2, forwards, tmp_path) == [0, 0]


@pytest.mark.parametrize(("size", "scatters"), [(2, False), (4, True)])
def test_what_is_sent_is_what_the_plan_says(size: int, scatters: bool, tmp_path: Path) -> None:
    changes = {"shard": 2, "shard_gradients": scatters, "ppo": replace(PPO, minibatch_draw="stratified")}

    def sent() -> float:
        trainer = trainer_for(**changes)
        trainer.train_iteration()
        return trainer.world.traffic.num_bytes

    whole = trainer_for(ppo=changes["ppo"])
    backbone, table = whole.backbone, whole.table
    costs = count(backbone, whole.critic, table, backbone.encode_unconditional(1), whole.config)
    planned = scaling(
        *(costs, replace(whole.config, shard=2, shard_gradients=scatters), size),
        shards=Shards.of(backbone, 2),
        microbatch=PPO.microbatch_size,
        num_steps=table.num_steps,
    )
    total = planned.gradient_bytes + planned.gathered_bytes
    for found in on_ranks(size, sent, tmp_path):
        # Rewards, values and records come on top, and some blocks that FSDP fetches ahead for nothing.
        assert total <= found < 1.05 * total


def test_a_gradient_that_is_not_finite_on_one_rank_is_left_out_by_all_shards(tmp_path: Path) -> None:
    def bad() -> dict[str, Any]:
        trainer = trainer_for(shard=2)
        advantages = trainer.advantages

        def broken(rollout: Any) -> Any:
            found = advantages(rollout)
            return replace(found, policy=found.policy * (torch.nan if trainer.world.rank else 1))

        trainer.advantages = broken  # type: ignore[method-assign]
        before = state(trainer)["policy"]
        metrics = trainer.train_iteration()
        return {
            "bad": metrics["bad_gradients/policy"],
            "same": all(map(torch.equal, before, state(trainer)["policy"])),
        }

    assert on_ranks(2, bad, tmp_path) == [{"bad": 2, "same": True}] * 2


@pytest.mark.parametrize(
    ("changes", "refusal"),
    [
        (
            {"shard": 2},
            Refusal(
                "shard=2 does not divide the 1 ranks",
                cause="Weights are to be divided over a number of ranks that does not divide all.",
                remedy="torchrun --nproc-per-node 2",
            ),
        ),
        (
            {"shard": 2, "graph": GraphConfig(mode="on")},
            Refusal(
                "graph.mode='on' would freeze where weights are gathered to",
                cause="Graphs are asked for with sharded weights.",
                remedy="use graph.mode='auto'",
            ),
        ),
        (
            {"shard": 2, "rollout_precision": "fp8"},
            Refusal(
                "rollout_precision='fp8' keeps a quantised copy of all weights",
                cause="A quantised policy is to sample beside sharded weights.",
                remedy="use rollout_precision='model' or shard=1",
            ),
        ),
        (
            {"shard": 2, "staleness": 1},
            Refusal(
                "staleness=1 and rollout_ranks=0 keep and send whole weights",
                cause="Weights are to be sharded where rollouts are of older ones, or made apart.",
                remedy="use staleness=0 and rollout_ranks=0, or shard=1",
            ),
        ),
        (
            {"shard_gradients": True},
            Refusal(
                "shard_gradients=True would be ignored: shard=1 divides nothing",
                cause="Gradients are to be divided where weights are whole.",
                remedy="set shard",
            ),
        ),
    ],
)
def test_sharding_that_cannot_be_is_refused(changes: dict[str, Any], refusal: Refusal) -> None:
    with refusal.raised():
        trainer_for(**changes)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--train.shard", "3"], "lacfast: shard=3 does not divide the 2 ranks"),
        (["--train.shard", "2", "--train.graph.mode", "on"], "lacfast: graph.mode='on' would freeze"),
    ],
)
def test_the_first_rank_alone_refuses_before_any_work(options: list[str], told: str, tmp_path: Path) -> None:
    out = tmp_path / "run"

    def refused() -> tuple[int, str]:
        with redirect_stderr(io.StringIO()) as written:
            code = main(["train", "shapes", "--out", str(out), *options])
        return code, written.getvalue()

    ranks, _store = started(2, refused, tmp_path)
    for process in ranks:
        process.join(timeout=60)
    (code, first), (_, second) = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert code == USAGE
    assert told in first
    assert second == ""
    assert not out.exists()
