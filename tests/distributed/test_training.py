"""The number of ranks changes the order of sums and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import on_ranks
from tiny_backbones import PROMPTS, brightness, tiny_backbone, tiny_config
from torch import distributed

from lacfast import LatentActorCriticTrainer
from lacfast.config import (
    GRPO,
    AdvantageConfig,
    CriticConfig,
    GraphConfig,
    KLPenalty,
    LoRAConfig,
    PPOConfig,
    Ratio,
    SamplerConfig,
    ValuePretrainingConfig,
)
from lacfast.records import Rollout

pytestmark = pytest.mark.skipif(not distributed.is_available(), reason="torch is without torch.distributed")
ITERATIONS = 3
# Adam makes a step of rounding errors where a gradient is 0, unless its epsilon is above them.
PPO = PPOConfig(clip=Ratio(1e-3), num_minibatches=2, microbatch_size=4, adam_eps=1e-4)
SMALL = {"hidden_dim": 16, "head_dim": 8, "num_heads": 2}
PRETRAINING = ValuePretrainingConfig(iterations=2, held_out_samples=8, completions=2, bound_states=4)
GROUPS = AdvantageConfig(estimator=GRPO())


def redness(images: torch.Tensor, prompts: list[str], metadata: list[dict[str, object]]) -> torch.Tensor:
    return images[:, 0].mean(dim=(1, 2)) - images[:, 1].mean(dim=(1, 2))


ARMS: dict[str, dict[str, Any]] = {
    "branch": {},
    "lora": {"lora": LoRAConfig(rank=2)},
    "shared": {"critic": CriticConfig(trunk="shared", **SMALL)},
    "joint": {"critic": CriticConfig(trunk="joint", joint_weight=0.1, **SMALL)},
    "clean_net": {"critic": CriticConfig(trunk="clean_net", **SMALL)},
    "groups": {"advantages": GROUPS, "samples_per_prompt": 4},
    "two rewards": {"rewards": [brightness, redness], "guidance": 2.0},
    "kl": {"ppo": replace(PPO, kl=KLPenalty(0.1), kl_limit=0.5, num_inner_epochs=2)},
    "stratified": {"ppo": replace(PPO, minibatch_draw="stratified")},
    "replay": {"ppo": replace(PPO, critic_rollouts=2)},
    "value pretraining": {"pretrain": PRETRAINING},
    "graphs": {"graph": GraphConfig(mode="fake")},
}
CASES = {arm: (2, 3, 4) if arm in ("branch", "two rewards") else (2,) for arm in ARMS}
"""Arm -> the numbers of ranks that it is tried on."""


def trainer_for(**changes: Any) -> LatentActorCriticTrainer:
    backbone = tiny_backbone("dit", lora=changes.pop("lora", None))
    rewards = changes.pop("rewards", [brightness])
    sampler = SamplerConfig(num_steps=3, guidance_scale=changes.pop("guidance", 1.0))
    settings = {"rollout_batch_size": 2, "sampler": sampler, "ppo": PPO} | changes
    return LatentActorCriticTrainer(backbone, rewards, PROMPTS, tiny_config(**settings))


def state(trainer: LatentActorCriticTrainer) -> dict[str, Any]:
    """What a run is to leave: its weights, the critic's, the statistics."""
    critic = {} if trainer.critic is None else trainer.critic.state_dict()
    return {
        "policy": [parameter.detach().clone() for parameter in trainer.backbone.policy_parameters()],
        "critic": [tensor.clone() for tensor in critic.values()],
        "std": trainer.normalizer.std,
    }


def gradient_bytes(trainer: LatentActorCriticTrainer, ranks: int) -> float:
    """What a ring sends of the gradients of an iteration: twice all but one's own part, 4 bytes a weight."""
    trained = sum(parameter.numel() for parameter in trainer.backbone.policy_parameters())
    assert trainer.critic is not None
    learned = sum(parameter.numel() for parameter in trainer.critic.parameters() if parameter.requires_grad)
    return 2 * (ranks - 1) / ranks * 4 * PPO.num_minibatches * (trained + learned)


def trained(arms: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Every arm's first trajectories on this rank, its metrics and what it leaves."""
    found = {}
    for name, changes in arms.items():
        trainer, rollouts, history = trainer_for(**changes), [], []
        if "pretrain" in changes:
            history = trainer.pretrain_critic().history
        metrics = [trainer.train_iteration(rollouts.append) for _ in range(ITERATIONS)]
        first: Rollout = rollouts[0]
        evaluation = trainer.evaluate(samples=6)
        found[name] = state(trainer) | {
            "latents": first.latents,
            "ids": first.noise.sample_ids,
            "rewards": [metric["reward/brightness"] for metric in metrics],
            "evaluation": evaluation.means(),
            "history": history,
            "traffic": metrics[-1].get("traffic_bytes", 0),
            "gradient_bytes": 0 if trainer.critic is None else gradient_bytes(trainer, trainer.world.size),
            "images_made": trainer.images,
            "images": evaluation.images,
        }
        trainer.close()
    return found


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Any]]]:
    """Every arm on every number of ranks."""

    def work(size: int) -> Callable[[], Any]:
        return lambda: trained({arm: ARMS[arm] for arm, sizes in CASES.items() if size in (1, *sizes)})

    return {
        size: on_ranks(size, work(size), tmp_path_factory.mktemp(f"ranks{size}")) for size in (1, 2, 3, 4)
    }


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_gradients_are_sent_once_per_optimizer_step(size: int, runs: dict[int, list[dict[str, Any]]]) -> None:
    for found in runs[size]:
        # The sums of the optimizer steps' records come on top.
        assert 0 <= found["branch"]["traffic"] - found["branch"]["gradient_bytes"] < 8000


@pytest.mark.parametrize(("arm", "size"), [(arm, size) for arm, sizes in CASES.items() for size in sizes])
def test_a_run_does_not_depend_on_the_number_of_ranks(
    arm: str, size: int, runs: dict[int, list[dict[str, Any]]]
) -> None:
    alone, ranks = runs[1][0][arm], [found[arm] for found in runs[size]]
    assert torch.equal(torch.cat([found["ids"] for found in ranks]), alone["ids"])
    latents = torch.cat([found["latents"] for found in ranks], dim=1)
    if 8 % (2 * size):
        # Parts of other sizes may take another kernel.
        torch.testing.assert_close(latents, alone["latents"], rtol=0, atol=1e-5)
    else:
        assert torch.equal(latents, alone["latents"])
    for found in ranks:
        for kind, close in (("policy", 1e-6), ("critic", 2e-5)):
            torch.testing.assert_close(found[kind], alone[kind], rtol=0, atol=close)
            assert all(map(torch.equal, found[kind], ranks[0][kind]))
        torch.testing.assert_close(found["std"], alone["std"], rtol=1e-5, atol=0)
        assert found["rewards"] == pytest.approx(alone["rewards"], abs=1e-6)
        assert found["history"] == pytest.approx(alone["history"], abs=1e-5)
        assert found["images_made"] == alone["images_made"]
        assert found["evaluation"] == pytest.approx(alone["evaluation"], abs=1e-6)
    torch.testing.assert_close(ranks[0]["images"], alone["images"], rtol=0, atol=1e-4)


SAVED = {"replay": ARMS["replay"], "groups": ARMS["groups"]}


def test_a_run_goes_on_with_another_number_of_ranks(tmp_path: Path) -> None:
    def saved() -> None:
        for name, changes in SAVED.items():
            trainer = trainer_for(**changes)
            trainer.train_iteration()
            trainer.save(tmp_path / name)

    def resumed() -> dict[str, Any]:
        found = {}
        for name, changes in SAVED.items():
            trainer, rollouts = trainer_for(**changes), []
            trainer.load(tmp_path / name)
            trainer.train_iteration(rollouts.append)
            found[name] = state(trainer) | {"latents": rollouts[0].latents}
        return found

    on_ranks(4, saved, tmp_path / "4")
    alone = resumed()
    for size in (2, 3):
        ranks = on_ranks(size, resumed, tmp_path / str(size))
        for name, expected in alone.items():
            latents = torch.cat([found[name]["latents"] for found in ranks], dim=1)
            torch.testing.assert_close(latents, expected["latents"], rtol=0, atol=0 if size == 2 else 1e-5)
            torch.testing.assert_close(ranks[0][name]["policy"], expected["policy"], rtol=0, atol=1e-6)
            torch.testing.assert_close(ranks[0][name]["critic"], expected["critic"], rtol=0, atol=2e-5)
