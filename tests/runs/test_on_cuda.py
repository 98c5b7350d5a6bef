"""The command line's jobs on a pretended CUDA device: a run, its resumption, its evaluation, its steering."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from host_waits import WaitLog
from tiny_backbones import tiny_config
from tiny_pipelines import PROMPTS, tiny_pipeline

from lacfast.config import (
    GraphConfig,
    LoRAConfig,
    PipelineSettings,
    PPOConfig,
    Ratio,
    SamplerConfig,
    SteeringConfig,
    ValuePretrainingConfig,
)
from lacfast.runs import train as run
from lacfast.runs.config import EvaluationRun, RunConfig, SteeringRun
from lacfast.runs.evaluate import evaluate_model
from lacfast.runs.steer import steer_model

REWARD = "tiny_backbones:brightness"


def test_a_run_is_stopped_resumed_evaluated_and_steered(cuda: WaitLog, tmp_path: Path) -> None:
    tiny_pipeline("sd3").save_pretrained(tmp_path / "model")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS), encoding="utf-8")
    config = RunConfig(
        out=str(tmp_path / "run"),
        model=str(tmp_path / "model"),
        prompts=str(prompts),
        rewards=((REWARD, 1.0),),
        pipeline=PipelineSettings(resolution=(16, 16), max_sequence_length=16),
        lora=LoRAConfig(rank=2),
        save_every=1,
        train=tiny_config(
            batch_size=4,
            iterations=1,
            eval_every=1,
            eval_samples=4,
            sampler=SamplerConfig(num_steps=3),
            ppo=PPOConfig(clip=Ratio(1e-3), num_minibatches=1, microbatch_size=12),
            pretrain=ValuePretrainingConfig(iterations=1, held_out_samples=4, minibatch_size=8),
            graph=GraphConfig(mode="off"),
        ),
    )
    run.train(config)
    last = run.train(replace(config, train=replace(config.train, iterations=2)))
    assert last.name == "00000002"
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines if line["phase"] == "train"] == [1, 2]
    common = {"source": config.out, "rewards": (REWARD,)}
    evaluation = evaluate_model(
        EvaluationRun(prompts=str(prompts), samples=4, batch_size=2, out=tmp_path / "scores", **common)
    )
    assert evaluation.means()["brightness"] > 0
    settings = SteeringConfig(method="best_of_n", particles=2)
    steered = SteeringRun(
        prompts=(str(prompts),), samples=2, settings=settings, out=tmp_path / "steered", **common
    )
    stats = steer_model(steered)
    assert stats.evaluations.images == 2
    assert json.loads((tmp_path / "steered" / "statistics.json").read_text())
