"""Training on a pretended CUDA device: every way through an iteration, on strict graphs or eagerly.

No operator and no kernel is given a tensor of the host, and no capture does what a capture cannot.
"""

from __future__ import annotations

import importlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_backbones
import torch
from host_waits import WaitLog
from tiny_backbones import PROMPTS, on_cuda, tiny_backbone, tiny_config
from torch import Tensor

from lacfast import LatentActorCriticTrainer, steer
from lacfast.config import (
    AWM,
    DDPO,
    NFT,
    AdvantageConfig,
    CriticConfig,
    GraphConfig,
    KLPenalty,
    LoRAConfig,
    PPOConfig,
    Random,
    Ratio,
    SamplerConfig,
    SteeringConfig,
    TrainConfig,
    ValuePretrainingConfig,
)

GRAPHS = GraphConfig(mode="on", strict=True, warmup_steps=1)
EAGER = GraphConfig(mode="off")
PPO = PPOConfig(clip=Ratio(1e-3), num_minibatches=2, microbatch_size=4)
FORWARD = replace(PPO, clip=PPOConfig().clip, kl=KLPenalty(0.01, "velocity"))
SLOW = pytest.mark.slow
GUIDED = SamplerConfig(num_steps=3, guidance_scale=2.5)
CRITIC = CriticConfig(hidden_dim=16, head_dim=8, num_heads=2)


def spread(images: Tensor, prompts: list[str], metadata: list[dict[str, object]]) -> Tensor:
    """A second reward."""
    return images.std(dim=(1, 2, 3))


def config_of(**changes: Any) -> TrainConfig:
    settings: dict[str, Any] = {"batch_size": 4, "ppo": PPO, "sampler": SamplerConfig(num_steps=3)}
    return tiny_config(**(settings | changes))


def trainer_for(
    lora: LoRAConfig | None = None, rewards: Any = tiny_backbones.brightness, **changes: Any
) -> LatentActorCriticTrainer:
    backbone = on_cuda(tiny_backbone("dit", lora=lora))
    return LatentActorCriticTrainer(backbone, rewards, PROMPTS, config_of(**changes))


def assert_trains(trainer: LatentActorCriticTrainer, iterations: int = 2) -> None:
    before = [parameter.detach().clone() for parameter in trainer.backbone.policy_parameters()]
    metrics = [trainer.train_iteration() for _ in range(iterations)]
    assert all(parameter.is_cuda for parameter in trainer.backbone.model.parameters())
    assert metrics[0].get("first_max_abs_log_ratio", 0) < 1e-4
    assert any(
        not torch.equal(old, new)
        for old, new in zip(before, trainer.backbone.policy_parameters(), strict=True)
    )
    assert all(not value.is_cuda for value in metrics[-1].values() if isinstance(value, Tensor))


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"graph": EAGER, "sampler": GUIDED}, id="eager, guided"),
        pytest.param(
            {"graph": GRAPHS, "ppo": replace(PPO, cfg_grad="both"), "sampler": GUIDED},
            id="guided",
            marks=SLOW,
        ),
        pytest.param(
            {
                "graph": GRAPHS,
                "ppo": replace(PPO, kl=KLPenalty(0.04), num_inner_epochs=2),
                "lora": LoRAConfig(rank=2),
            },
            id="KL of a LoRA",
        ),
        pytest.param(
            {"graph": EAGER, "ppo": replace(PPO, kl=KLPenalty(0.04, target=1e-4))},
            id="adaptive KL",
            marks=SLOW,
        ),
        pytest.param({"graph": EAGER, "ppo": replace(PPO, kl_limit=1.0)}, id="KL limit", marks=SLOW),
        pytest.param({"graph": GRAPHS, "gradient_checkpointing": True}, id="checkpointing"),
        pytest.param({"graph": EAGER, "ppo": replace(PPO, microbatch_size=0)}, id="found size"),
        pytest.param({"graph": EAGER, "ppo": replace(PPO, critic_rollouts=2)}, id="replayed values"),
        pytest.param(
            {"graph": EAGER, "ppo": replace(PPO, gae_lambda=0.9, lambda_gate=0.1)}, id="gate", marks=SLOW
        ),
        pytest.param(
            {"graph": GRAPHS, "sampler": SamplerConfig(num_steps=4, window=Random(2))},
            id="moving window",
            marks=SLOW,
        ),
        pytest.param(
            {"graph": EAGER, "critic": replace(CRITIC, loss="hl_gauss", text_conditioning="tokens")},
            id="distribution of values",
            marks=SLOW,
        ),
        pytest.param(
            {
                "graph": EAGER,
                "critic": CriticConfig(trunk="none"),
                "advantages": AdvantageConfig(estimator=DDPO()),
            },
            id="statistics per prompt",
        ),
        pytest.param({"graph": GRAPHS, "objective": NFT(), "ppo": FORWARD, "sampler": GUIDED}, id="NFT"),
        pytest.param(
            {
                "graph": GRAPHS,
                "objective": AWM(),
                "ppo": replace(FORWARD, timestep_fraction=0.5),
                "critic": CriticConfig(trunk="none"),
                "advantages": AdvantageConfig(estimator=DDPO()),
            },
            id="AWM without a critic",
        ),
    ],
)
def test_an_iteration_trains(cuda: WaitLog, changes: dict[str, Any]) -> None:
    trainer = trainer_for(**changes)
    assert_trains(trainer)
    assert trainer.graphs.statistics.fallbacks == 0
    assert (trainer.graphs.statistics.captures > 0) == (trainer.config.graph is GRAPHS)


@pytest.mark.parametrize(
    "trunk", ["lora", "clean_net", *(pytest.param(name, marks=SLOW) for name in ("shared", "joint", "copy"))]
)
def test_every_trunk_is_valued(cuda: WaitLog, trunk: str) -> None:
    lora = LoRAConfig(rank=2) if trunk == "lora" else None
    assert_trains(trainer_for(graph=EAGER, critic=replace(CRITIC, trunk=trunk), lora=lora), iterations=1)


@pytest.mark.parametrize(
    "advantages",
    [
        pytest.param(
            AdvantageConfig(combination="constrained", floors=(("spread", 0.2),)),
            marks=SLOW,
            id="constrained",
        ),
        pytest.param(AdvantageConfig(combination="scalarized"), marks=SLOW, id="scalarized"),
        AdvantageConfig(combination="conditional", conditions=(("brightness", "spread", 0.1),)),
    ],
)
def test_several_rewards_are_combined(cuda: WaitLog, advantages: AdvantageConfig) -> None:
    rewards = {tiny_backbones.brightness: 1.0, spread: 0.5}
    assert_trains(trainer_for(graph=EAGER, rewards=rewards, advantages=advantages), iterations=1)


@pytest.mark.filterwarnings("ignore:backend .* is not usable")
def test_a_device_without_kernels_runs_the_reference(cuda: WaitLog, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = importlib.import_module("lacfast.ops.backend")
    monkeypatch.setattr(backend, "unusable_reason", lambda name: "" if name == "reference" else "too old")
    backend._natural_backend.cache_clear()
    trainer = trainer_for(graph=EAGER, sampler=GUIDED)
    assert_trains(trainer, iterations=1)
    steer(trainer.backbone, PROMPTS[:1], SteeringConfig(method="smc", particles=2), sampler=GUIDED)


def test_values_are_pretrained_within_bounds(cuda: WaitLog) -> None:
    pretrain = ValuePretrainingConfig(iterations=1, held_out_samples=4, completions=2, bound_states=2)
    trainer = trainer_for(graph=EAGER, pretrain=pretrain)
    result = trainer.pretrain_critic()
    assert result.bounds is not None
    assert_trains(trainer, iterations=1)


def test_an_evaluation_is_on_the_host(cuda: WaitLog) -> None:
    trainer = trainer_for(graph=GRAPHS, eval_batch_size=3, ema_decay=0.9)
    evaluation = trainer.evaluate()
    tensors = (evaluation.images, evaluation.explained_variance, *evaluation.rewards.values())
    assert not any(tensor.is_cuda for tensor in tensors)


def test_a_run_goes_on_from_its_checkpoint_as_if_it_had_not_stopped(cuda: WaitLog, tmp_path: Path) -> None:
    settings = {"graph": EAGER, "ema_decay": 0.9, "ppo": replace(PPO, critic_rollouts=2)}
    through, stopped = trainer_for(**settings), trainer_for(**settings)
    for trainer in (through, stopped):
        trainer.train_iteration()
    stopped.save(tmp_path / "checkpoint")
    again = trainer_for(**settings)
    again.load(tmp_path / "checkpoint")
    for trainer in (through, again):
        trainer.train_iteration()
    ours, theirs = (trainer.backbone.model.state_dict() for trainer in (again, through))
    assert all(tensor.is_cuda for tensor in ours.values())
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name
