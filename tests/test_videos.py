"""A model of videos from end to end: it learns a reward of whole videos, and the command line shows them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tiny_pipelines import FRAMES, LENGTH, PROMPTS, RESOLUTION, backbone_of, saved_pipeline, tiny_pipeline
from torch import Tensor

from lacfast import LatentActorCriticTrainer, LoRAConfig, PPOConfig, SamplerConfig, TrainConfig
from lacfast.cli import main
from lacfast.config import CriticConfig, Ratio, ValuePretrainingConfig
from lacfast.rewards.reward import declares


@declares(video=True)
def brightening(videos: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
    """How much brighter the last frame is than the first, in [-1, 1]."""
    return (videos[:, -1] - videos[:, 0]).mean(dim=(1, 2, 3))


@pytest.mark.slow
def test_a_model_of_videos_learns_a_reward_over_time() -> None:
    backbone = backbone_of(tiny_pipeline("wan"), lora=LoRAConfig(rank=8, alpha=32))
    config = TrainConfig(
        batch_size=32,
        sampler=SamplerConfig(num_steps=4, noise_level=0.7),
        critic=CriticConfig(trunk="shared", hidden_dim=32, head_dim=8, num_heads=2),
        ppo=PPOConfig(clip=Ratio(1e-2), policy_learning_rate=3e-3, num_minibatches=2, microbatch_size=32),
        pretrain=ValuePretrainingConfig(iterations=2, held_out_samples=16),
        eval_samples=64,
        eval_batch_size=32,
    )
    trainer = LatentActorCriticTrainer(backbone, brightening, PROMPTS, config)
    before = trainer.evaluate()
    trainer.train(25)
    after = trainer.evaluate()
    risen = after.rewards["brightening"] - before.rewards["brightening"]
    # The same prompts and noise: a paired difference.
    error = float(risen.std()) / len(risen) ** 0.5
    assert float(risen.mean()) > 5 * error
    assert before.images.shape == (64, 3, 3, *RESOLUTION)


def test_the_command_line_trains_evaluates_and_steers_videos(tmp_path: Path) -> None:
    model, run = saved_pipeline("wan", tmp_path / "model"), tmp_path / "run"
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS[:4]), encoding="utf-8")
    height, width = RESOLUTION
    flags = f"""
        --model {model} --prompts {prompts} --held-out {prompts} --out {run} --dtype float32 --lora.rank 2
        --pipeline.resolution {height} {width} --pipeline.num-frames {FRAMES} --pipeline.judged-frames 2
        --pipeline.max-sequence-length {LENGTH}
        --rewards test_videos:brightening 1.0 --evaluation-rewards tiny_backbones:brightness
        --train.batch-size 4 --train.samples-per-prompt 2 --train.rollout-batch-size 4 --train.iterations 1
        --train.sampler.num-steps 2 --train.eval-sampler.num-steps 2
        --train.eval-every 1 --train.eval-samples 4 --train.eval-batch-size 4
    """.split()
    assert main(["train", "flow-grpo-wan-ocr", *flags]) == 0
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    (judged,) = [record for record in records if record["phase"] == "evaluate" and record["iteration"] == 1]
    assert {"brightening", "brightness"} <= judged.keys()
    grid = next((run / "samples").glob("*.png"))
    # Four rows of two frames, enlarged.
    with Image.open(grid) as sheet:
        assert sheet.size == (2 * (96 + 2) + 2, 4 * (96 + 2) + 2)

    out = tmp_path / "steered"
    steering = ["steer", str(run), "--prompts", PROMPTS[0], "--out", str(out), "--method", "best_of_n"]
    steering += ["--particles", "2", "--selection", "reward", "--rewards", "test_videos:brightening"]
    assert main(steering) == 0
    with Image.open(out / "images" / "00000.webp") as video:
        assert (video.n_frames, video.size) == (FRAMES, RESOLUTION[::-1])
    statistics = json.loads((out / "statistics.json").read_text(encoding="utf-8"))
    assert statistics["images"][0]["file"] == "images/00000.webp"
    assert statistics["images"][0]["scores"].keys() == {"brightening"}
