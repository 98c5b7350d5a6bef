"""Weights in parts on several ranks train as whole ones do, and are saved for any number of ranks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from ranked_runs import PPO, PRETRAINING, assert_same_run, state, trained, trainer_for
from ranks import on_ranks, together
from refusals import Refusal
from tiny_pipelines import backbone_of, tiny_pipeline
from tiny_trainers import trainer_of
from torch import distributed

from lacfast.backbones import load_backbone
from lacfast.backbones.latent import LatentBackbone
from lacfast.config import GraphConfig, LoRAConfig
from lacfast.distributed.sharding import gathered, is_sharded, own_part
from lacfast.runs.costs import count
from lacfast.runs.scaling import scaling
from lacfast.runs.shards import Shards

pytestmark = pytest.mark.skipif(not distributed.is_available(), reason="torch is without torch.distributed")
CASES = {
    **dict.fromkeys(("branch", "scattered"), (4,)),
    **dict.fromkeys(
        ("lora", "shared", "clean_net", "uneven, kl, replay", "copy", "on the policy's features"), (2,)
    ),
}
"""Arm -> the numbers of ranks that it is tried on, with two parts."""
AVERAGED = {"ema_decay": 0.5}
Runs = dict[int, dict[str, list[Any]]]


def trained_in_parts(size: int) -> dict[str, Any]:
    arms = [arm for arm, sizes in CASES.items() if size in sizes]
    scattered = [arm for arm in arms if arm == "scattered"]
    whole = [arm for arm in arms if arm != "scattered"]
    return trained(whole, shard=2) | trained(scattered, shard=2, shard_gradients=True)


def saved(checkpoint: Path, shard: int) -> None:
    trainer = trainer_for(**AVERAGED, shard=shard)
    trainer.train_iteration()
    trainer.save(checkpoint)


def resumed(checkpoint: Path, **changes: Any) -> dict[str, Any]:
    trainer, rollouts = trainer_for(**AVERAGED, **changes), []
    trainer.load(checkpoint)
    trainer.train_iteration(rollouts.append)
    return state(trainer) | {"latents": rollouts[0].latents, "means": trainer.evaluate(samples=6).means()}


def begun(checkpoint: Path) -> None:
    """Save behind the first of two iterations of value pretraining."""
    trainer = trainer_for(pretrain=PRETRAINING, shard=2)

    def stop(*_: Any) -> None:
        trainer.save(checkpoint)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trainer.pretrain_critic(stop)


def ended(checkpoint: Path, shard: int) -> list[float]:
    trainer = trainer_for(pretrain=PRETRAINING, shard=shard)
    trainer.load(checkpoint)
    return trainer.pretrain_critic().history


def parts() -> dict[str, Any]:
    """What a rank has of weights and moments, and sends in forwards of its own within `gathered`."""
    trainer = trainer_for(shard=2)
    trainer.train_iteration()
    optimizer, backbone = trainer.learner.policy_update.optimizer, trainer.backbone
    weights = backbone.policy_parameters()
    assert all(map(is_sharded, weights))
    kept = [*weights, *(each["exp_avg"] for each in optimizer.state.values())]
    sample, prompts = torch.zeros(1, *backbone.latent_shape), backbone.encode_unconditional(1)
    with gathered(backbone.model), torch.no_grad():
        sent = trainer.world.traffic.num_bytes
        for _ in range(3 * trainer.world.rank):
            backbone.predict(sample, torch.ones(1), prompts)
        sent = trainer.world.traffic.num_bytes - sent
    return {
        "own": sum(own_part(each).numel() for each in kept),
        "all": sum(each.numel() for each in kept),
        "sent": sent,
    }


COUNTED = replace(PPO, minibatch_draw="stratified", microbatch_size=2)
"""Of the iterations whose bytes are counted; the arm "scattered" has it too."""


def videos(shard: int = 1) -> dict[str, Any]:
    """An iteration of a model of videos, whose latents have frames."""
    backbone, rollouts = backbone_of(tiny_pipeline("wan"), lora=LoRAConfig(rank=2)), []
    changes = {"ppo": replace(PPO, microbatch_size=2), "rollout_batch_size": 2, "shard": shard}
    trainer = trainer_of(backbone, guidance_scale=3.0, **changes)
    metrics = trainer.train_iteration(rollouts.append)
    # A LoRA stays whole.
    frozen = [weight for weight in backbone.model.parameters() if not weight.requires_grad]
    return state(trainer) | {
        "latents": rollouts[0].latents,
        "reward": metrics["reward/brightness"],
        "shape": trainer.evaluate(samples=4).images.shape,
        "is_in_parts": all(map(is_sharded, frozen)),
    }


def sent() -> float:
    found: float = trainer_for(shard=2, ppo=COUNTED).train_iteration()["traffic_bytes"]
    return found


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


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What four ranks save in two parts, one rank whole, and two in the midst of value pretraining."""
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def runs(checkpoints: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """What two and four ranks do, in one group of processes each."""
    saved(checkpoints / "whole", 1)
    four: dict[str, Callable[[], Any]] = {
        "trained": lambda: trained_in_parts(4),
        "saved": lambda: saved(checkpoints / "parts", 2),
    }
    two: dict[str, Callable[[], Any]] = {
        "trained": lambda: trained_in_parts(2),
        "parts, whole": lambda: resumed(checkpoints / "parts"),
        "parts, in parts": lambda: resumed(checkpoints / "parts", shard=2),
        "whole, in parts": lambda: resumed(checkpoints / "whole", shard=2),
        "begun": lambda: begun(checkpoints / "begun"),
        "ended": lambda: ended(checkpoints / "begun", 2),
        "parts": parts,
        "sent": sent,
        "bad": bad,
        "videos": partial(videos, 2),
    }
    return {
        size: together(size, works, tmp_path_factory.mktemp(f"ranks{size}"))
        for size, works in ((4, four), (2, two))
    }


@pytest.mark.parametrize(("arm", "size"), [(arm, size) for arm, sizes in CASES.items() for size in sizes])
def test_a_run_does_not_depend_on_shards(arm: str, size: int, runs: Runs) -> None:
    assert_same_run(arm, runs[size]["trained"])


@pytest.mark.parametrize("checkpoint", ["parts", "whole"])
def test_a_run_goes_on_with_any_number_of_ranks_and_shards(
    checkpoint: str, checkpoints: Path, runs: Runs
) -> None:
    expected = resumed(checkpoints / checkpoint)
    for name in ("parts, whole", "parts, in parts", "whole, in parts"):
        if not name.startswith(f"{checkpoint},"):
            continue
        ranks = runs[2][name]
        assert torch.equal(torch.cat([found["latents"] for found in ranks], dim=1), expected["latents"])
        torch.testing.assert_close(ranks[0]["policy"], expected["policy"], rtol=0, atol=1e-6)
        torch.testing.assert_close(ranks[0]["critic"], expected["critic"], rtol=0, atol=2e-5)
        assert ranks[0]["means"] == pytest.approx(expected["means"], abs=1e-6)
    assert load_backbone(checkpoints / checkpoint).critic is not None


def test_value_pretraining_goes_on_sharded_and_whole(checkpoints: Path, runs: Runs) -> None:
    expected = ended(checkpoints / "begun", 1)
    assert len(expected) == 2
    for found in runs[2]["ended"]:
        assert found == pytest.approx(expected, abs=1e-5)


def test_a_rank_has_its_part_of_weights_and_moments(runs: Runs) -> None:
    first, second = runs[2]["parts"]
    assert first["all"] == second["all"] == first["own"] + second["own"]
    # An odd row makes the first rank's part a little larger.
    assert first["own"] / first["all"] < 0.52


def test_within_gathered_a_rank_may_run_alone(runs: Runs) -> None:
    assert [found["sent"] for found in runs[2]["parts"]] == [0, 0]


@pytest.mark.parametrize("size", [2, 4])
def test_what_is_sent_is_what_the_plan_says(size: int, runs: Runs) -> None:
    whole = trainer_for(ppo=COUNTED)
    backbone, table = whole.backbone, whole.table
    costs = count(backbone, whole.critic, table, backbone.encode_unconditional(1), whole.config)
    planned = scaling(
        *(costs, replace(whole.config, shard=2, shard_gradients=size == 4), size),
        shards=Shards.of(backbone, 2),
        microbatch=COUNTED.microbatch_size,
        num_steps=table.num_steps,
    )
    total = planned.gradient_bytes + planned.gathered_bytes
    of_four = [rank["scattered"]["traffic"] for rank in runs[4]["trained"]]
    for found in runs[2]["sent"] if size == 2 else of_four:
        # Rewards, values and records come on top, and some blocks that FSDP fetches ahead for nothing.
        assert total <= found < 1.05 * total


def test_a_gradient_that_is_not_finite_on_one_rank_is_left_out_by_all_shards(runs: Runs) -> None:
    assert runs[2]["bad"] == [{"bad": 2, "same": True}] * 2


def test_a_model_of_videos_trains_in_parts(runs: Runs) -> None:
    expected, ranks = videos(), runs[2]["videos"]
    assert not expected["is_in_parts"]
    latents = torch.cat([found["latents"] for found in ranks], dim=1)
    torch.testing.assert_close(latents, expected["latents"], rtol=0, atol=1e-5)
    assert latents.dim() == 6, "steps, trajectories, channels, frames, height, width"
    # The first rank has the images of all.
    assert ranks[0]["shape"] == expected["shape"]
    for found in ranks:
        assert found["is_in_parts"]
        assert found["reward"] == pytest.approx(expected["reward"], abs=1e-6)
        for kind, close in (("policy", 1e-6), ("critic", 2e-5)):
            torch.testing.assert_close(found[kind], expected[kind], rtol=0, atol=close)


@pytest.mark.slow
def test_compiled_blocks_train_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compile_blocks = LatentBackbone.compile_blocks
    monkeypatch.setattr(
        LatentBackbone, "compile_blocks", lambda backbone: compile_blocks(backbone, backend="eager")
    )
    assert_same_run("branch", on_ranks(2, lambda: trained(["branch"], compile=True, shard=2), tmp_path))


@pytest.mark.slow
def test_all_weights_in_bfloat16_train_in_parts(tmp_path: Path) -> None:
    """They are rounded where they are gathered, so trajectories are alike and not the same."""
    half = {"dtype": torch.bfloat16}
    expected = trained(["branch"], **half)["branch"]
    for found in on_ranks(2, lambda: trained(["branch"], shard=2, **half), tmp_path):
        assert {tensor.dtype for tensor in found["branch"]["policy"]} == {torch.float32}
        # They moved by ten times as much.
        for weight, known in zip(found["branch"]["policy"], expected["policy"], strict=True):
            torch.testing.assert_close(weight, known, rtol=0, atol=5e-5)
        assert found["branch"]["rewards"] == pytest.approx(expected["rewards"], abs=1e-4)


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
