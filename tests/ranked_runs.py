"""Tiny training runs of many kinds and what they leave: what numbers of ranks are held to each other by."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from tiny_backbones import PROMPTS, SMALLEST, brightness, tiny_backbone, tiny_config

from lacfast import LatentActorCriticTrainer
from lacfast.config import (
    GRPO,
    NFT,
    AdvantageConfig,
    CriticConfig,
    Fixed,
    GraphConfig,
    Hold,
    KLPenalty,
    LoRAConfig,
    PPOConfig,
    Ratio,
    SamplerConfig,
    ValuePretrainingConfig,
)
from lacfast.distributed.sharding import is_sharded
from lacfast.records import Rollout
from lacfast.tasks.models import TINY

ITERATIONS = 2
"""The second is of what the first left: weights, moments, statistics, a replay."""
# Adam makes a step of rounding errors where a gradient is 0, unless its epsilon is above them.
PPO = PPOConfig(clip=Ratio(1e-3), num_minibatches=2, microbatch_size=8, adam_eps=1e-4)
SMALL = {"hidden_dim": 16, "head_dim": 8, "num_heads": 2}
# The first minibatch must not have all states: standardised rewards have the mean 0, so the gradient of the
# value's bias would be rounding alone, of which Adam makes whole steps.
PRETRAINING = ValuePretrainingConfig(
    iterations=2, minibatch_size=8, held_out_samples=8, completions=2, bound_states=4
)
PART = 4
"""Trajectories at a time, which two ranks have as one does."""
SMALL_PARTS = {"rollout_batch_size": 2, "ppo": replace(PPO, microbatch_size=4)}
"""Several parts of a rollout and of a minibatch for each of two ranks, and as many for each of four."""
GROUPS = AdvantageConfig(estimator=GRPO())


def redness(images: torch.Tensor, prompts: list[str], metadata: list[dict[str, object]]) -> torch.Tensor:
    return images[:, 0].mean(dim=(1, 2)) - images[:, 1].mean(dim=(1, 2))


ARMS: dict[str, dict[str, Any]] = {
    "branch": SMALL_PARTS,
    "lora": {"lora": LoRAConfig(rank=2)},
    "shared": {"critic": CriticConfig(trunk="shared", **SMALL)},
    "joint": {
        "critic": CriticConfig(trunk="joint", joint_weight=0.1, **SMALL),
        "ppo": replace(PPO, minibatch_draw="stratified"),
    },
    "clean_net": {"critic": CriticConfig(trunk="clean_net", **SMALL)},
    "groups, hold": {
        "advantages": GROUPS,
        "samples_per_prompt": 4,
        "sampler": SamplerConfig(num_steps=3, window=Fixed((0, 2))),
        "ppo": replace(PPO, hold=Hold(0.5, share=0.5)),
    },
    "two rewards": {"rewards": [brightness, redness], "guidance": 2.0},
    "uneven, kl, replay": {
        "batch_size": 7,
        "samples_per_prompt": 1,
        "ppo": replace(
            PPO,
            kl=KLPenalty(0.1),
            kl_limit=0.5,
            num_inner_epochs=2,
            critic_rollouts=2,
            num_minibatches=4,
        ),
    },
    "value pretraining": {"pretrain": PRETRAINING},
    "graphs": {"graph": GraphConfig(mode="fake")},
    "forward process": {
        "objective": NFT(0.5, old_decay=0.5, old_decay_rate=0.2),
        "ppo": replace(PPO, clip=PPOConfig().clip),
    },
    "forward process, groups": {
        "objective": NFT(0.5, old_decay=0.5, old_decay_rate=0.2),
        "critic": CriticConfig(trunk="none"),
        "advantages": GROUPS,
        "samples_per_prompt": 4,
        "ppo": replace(PPO, clip=PPOConfig().clip, timestep_fraction=0.5),
    },
    "copy": {"critic": CriticConfig(trunk="copy", **SMALL)},
    "on the policy's features": {"critic": CriticConfig(trunk="branch", keep_features=False, **SMALL)},
    "scattered": SMALL_PARTS
    | {
        "gradient_checkpointing": True,
        "ema_decay": 0.5,
        "ppo": replace(PPO, minibatch_draw="stratified", microbatch_size=2),
    },
}


def trainer_for(**changes: Any) -> LatentActorCriticTrainer:
    # A pretrained critic's gradients are near rounding in the smallest model.
    size = TINY if "pretrain" in changes else SMALLEST
    backbone = tiny_backbone("dit", lora=changes.pop("lora", None), size=size)
    backbone.dtype = changes.pop("dtype", backbone.dtype)
    rewards = changes.pop("rewards", [brightness])
    sampler = SamplerConfig(num_steps=3, guidance_scale=changes.pop("guidance", 1.0))
    settings = {"rollout_batch_size": PART, "sampler": sampler, "ppo": PPO} | changes
    return LatentActorCriticTrainer(backbone, rewards, PROMPTS, tiny_config(**settings))


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A copy; of a sharded tensor all of it, on every rank."""
    return (tensor.full_tensor() if is_sharded(tensor) else tensor).detach().clone()


def state(trainer: LatentActorCriticTrainer) -> dict[str, Any]:
    """What a run is to leave: its weights, the critic's, the statistics."""
    critic = {} if trainer.critic is None else trainer.critic.state_dict()
    return {
        "policy": [whole(parameter) for parameter in trainer.backbone.policy_parameters()],
        "critic": [whole(tensor) for tensor in critic.values()],
        "std": trainer.normalizer.std,
    }


def gradient_bytes(trainer: LatentActorCriticTrainer, ranks: int) -> float:
    """What a ring sends of the gradients of an iteration: twice all but one's own part, 4 bytes a weight."""
    trained = sum(parameter.numel() for parameter in trainer.backbone.policy_parameters())
    assert trainer.critic is not None
    learned = sum(parameter.numel() for parameter in trainer.critic.parameters() if parameter.requires_grad)
    return 2 * (ranks - 1) / ranks * 4 * PPO.num_minibatches * (trained + learned)


def trained(arms: Iterable[str], **changes: Any) -> dict[str, Any]:
    """Every arm's first trajectories on this rank, its metrics and what it leaves, with further changes."""
    found = {}
    for name in arms:
        trainer, rollouts, history = trainer_for(**ARMS[name], **changes), [], []
        if "pretrain" in ARMS[name]:
            history = trainer.pretrain_critic().history
        metrics = [trainer.train_iteration(rollouts.append) for _ in range(ITERATIONS)]
        first: Rollout = rollouts[0]
        # Prompts come again: two images of one tell the diversity, and lie on different ranks.
        evaluation = trainer.evaluate(samples=10)
        found[name] = state(trainer) | {
            "latents": first.latents,
            "ids": first.noise.sample_ids,
            "rewards": [metric["reward/brightness"] for metric in metrics],
            "evaluation": evaluation.means(),
            "held": [float(metric.get("hold_distance", 0)) for metric in metrics],
            "history": history,
            "traffic": metrics[-1].get("traffic_bytes", 0),
            "gradient_bytes": 0 if trainer.critic is None else gradient_bytes(trainer, trainer.world.size),
            "images_made": trainer.images,
            "images": evaluation.images,
        }
        trainer.close()
    return found


@cache
def alone(arm: str) -> dict[str, Any]:
    """What an arm comes to in one process."""
    found: dict[str, Any] = trained([arm])[arm]
    return found


def assert_same_run(arm: str, ranks: list[dict[str, Any]]) -> None:
    """What the ranks found of an arm is what one process does, up to the order of sums."""
    expected, found = alone(arm), [rank[arm] for rank in ranks]
    assert torch.equal(torch.cat([rank["ids"] for rank in found]), expected["ids"])
    latents = torch.cat([rank["latents"] for rank in found], dim=1)
    # Parts of another size may take another kernel.
    part = ARMS[arm].get("rollout_batch_size", PART)
    is_whole = all(rank["latents"].shape[1] % part == 0 for rank in found[:-1])
    torch.testing.assert_close(latents, expected["latents"], rtol=0, atol=0 if is_whole else 1e-5)
    for rank in found:
        for kind, close in (("policy", 1e-6), ("critic", 2e-5)):
            torch.testing.assert_close(rank[kind], expected[kind], rtol=0, atol=close)
            assert all(map(torch.equal, rank[kind], found[0][kind]))
        torch.testing.assert_close(rank["std"], expected["std"], rtol=1e-5, atol=0)
        assert rank["rewards"] == pytest.approx(expected["rewards"], abs=1e-6)
        assert rank["history"] == pytest.approx(expected["history"], abs=1e-5)
        assert rank["held"] == pytest.approx(expected["held"], rel=1e-3)
        assert rank["images_made"] == expected["images_made"]
        assert rank["evaluation"] == pytest.approx(expected["evaluation"], abs=1e-6)
    torch.testing.assert_close(found[0]["images"], expected["images"], rtol=0, atol=1e-4)
