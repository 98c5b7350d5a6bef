"""Where the host waits for the device: exactly here, on a device that is pretended.

A wait that a test finds beyond its budget stands in the failure with its line. Keep the value on the device,
copy it from pinned memory (lacfast.transfer), or read it with what is read anyway (lacfast.metrics.on_host).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import tiny_backbones
import torch
from host_waits import WaitLog
from tiny_backbones import PROMPTS, on_cuda, tiny_backbone, tiny_config
from torch import Tensor

from lacfast import LatentActorCriticTrainer, steer
from lacfast.config import (
    GraphConfig,
    PPOConfig,
    Ratio,
    SamplerConfig,
    SteeringConfig,
    ValuePretrainingConfig,
)

GRAPHS = GraphConfig(mode="on", strict=True, warmup_steps=1)
PPO = PPOConfig(clip=Ratio(1e-3), num_minibatches=2, microbatch_size=8)
DRAWS = pytest.mark.parametrize("draw", ["free", "stratified"])
ITERATION = {
    # The records of all optimizer steps, then the metrics of the rollout.
    "lacfast/learning/totals.py:UpdateRecords.read": 1,
    "lacfast/metrics.py:on_host": 1,
}
SCORING = {
    # In the thread of the rewards, for every part of a rollout: are the images finite, and the scores.
    "lacfast/rewards/scoring.py:require_finite": 1,
    "lacfast/rewards/scoring.py:_checked": 1,
}


KEPT_ON_HOST = {
    # The rollouts of value pretraining lie on the host; a gather waits for the copy before the last.
    "lacfast/rollout/memory.py:RolloutMemory.add",
    "lacfast/rollout/memory.py:_allocated",
    "lacfast/runtime/host_memory.py:Staging.gather",
}


def trainer_for(**changes: Any) -> LatentActorCriticTrainer:
    backbone = on_cuda(tiny_backbone("dit"))
    path = changes.pop("metrics_path", None)
    settings = {"ppo": PPO, "batch_size": 4, "sampler": SamplerConfig(num_steps=3, guidance_scale=2.5)}
    config = tiny_config(**(settings | changes))
    return LatentActorCriticTrainer(backbone, tiny_backbones.brightness, PROMPTS, config, metrics_path=path)


@DRAWS
def test_a_guided_iteration_on_graphs_reads_its_records_and_its_metrics(
    cuda: WaitLog, tmp_path: Path, draw: Literal["free", "stratified"]
) -> None:
    ppo = replace(PPO, minibatch_draw=draw)
    trainer = trainer_for(graph=GRAPHS, ppo=ppo, metrics_path=tmp_path / "metrics.jsonl")
    for _ in range(2):
        trainer.train_iteration()
        trainer.evaluate()
    captures = trainer.graphs.statistics.captures
    cuda.clear()
    trainer.train_iteration()
    assert trainer.graphs.statistics.captures == captures
    assert trainer.graphs.statistics.fallbacks == 0
    assert cuda.beyond(ITERATION) == []
    assert cuda.beyond(SCORING, aside=True) == []
    assert (cuda.counts(), cuda.counts(aside=True)) == (ITERATION, SCORING)
    cuda.clear()
    trainer.evaluate()
    # Values and typical latents.
    evaluation = {"lacfast/rollout/scored.py:evaluate": 2}
    assert cuda.beyond(evaluation) == []
    assert cuda.counts() == evaluation


@DRAWS
def test_value_pretraining_waits_for_no_minibatch(cuda: WaitLog, draw: Literal["free", "stratified"]) -> None:
    counts = []
    ppo = replace(PPO, minibatch_draw=draw)
    for passes in (1.0, 3.0):
        pretrain = ValuePretrainingConfig(
            iterations=2,
            held_out_samples=4,
            minibatch_size=4,
            passes=passes,
            patience=3,
            completions=2,
            bound_states=2,
        )
        trainer = trainer_for(graph=GraphConfig(mode="off"), ppo=ppo, pretrain=pretrain)
        trainer.backbone.encode_prompts(PROMPTS)
        seen: list[Counter[str]] = []

        def waited(iteration: int, variance: Tensor, seen: list[Counter[str]] = seen) -> None:
            seen.append(Counter(wait.function for wait in cuda.waits if wait.function not in KEPT_ON_HOST))
            cuda.clear()

        trainer.pretrain_critic(waited)
        # Completions of states on the host wait for none of them.
        assert "lacfast/learning/value_bounds.py:complete" not in seen[0]
        counts.append(seen[1])
    assert counts[0] == counts[1]
    assert counts[0]["lacfast/learning/totals.py:UpdateRecords.read"] == 1


@pytest.mark.parametrize("guidance_weight", [0.0, 0.01])
def test_steering_waits_for_no_step(cuda: WaitLog, guidance_weight: float) -> None:
    backbone = trainer_for(graph=GraphConfig(mode="off")).backbone
    torch.nn.init.normal_(backbone.critic.head.output.weight)
    backbone.encode_prompts(PROMPTS)
    backbone.encode_unconditional(1)
    counts = []
    for num_steps in (3, 5):
        cuda.clear()
        config = SteeringConfig(method="smc", particles=2, guidance_weight=guidance_weight)
        sampler = SamplerConfig(num_steps=num_steps, guidance_scale=2.5)
        steer(backbone, PROMPTS[:2], config, sampler=sampler)
        counts.append([str(wait) for wait in cuda.waits])
    assert counts[0] == counts[1]
