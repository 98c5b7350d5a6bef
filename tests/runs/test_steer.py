"""lacfast steer: a run or a plain pipeline with a critic's file becomes images and statistics."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from refusals import Refusal
from tiny_backbones import PROMPTS, brightness, tiny_backbone, tiny_config
from tiny_pipelines import PROMPTS as PIPELINE_PROMPTS
from tiny_pipelines import tiny_pipeline
from torch import nn

import lacfast
from lacfast.checkpoint import CRITIC_WEIGHTS, save_backbone
from lacfast.cli import main
from lacfast.config import CriticConfig, Fixed, SamplerConfig, SteeringConfig, to_json
from lacfast.runs.endings import USAGE
from lacfast.runs.steer import prompts_to_steer
from lacfast.trainer import LatentActorCriticTrainer

SAMPLER = to_json(SamplerConfig(num_steps=4, noise_level=0.5, window=Fixed((0, 3))))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's directory: settings, and a best checkpoint whose critic has seen rewards."""
    directory = tmp_path_factory.mktemp("run")
    trainer = LatentActorCriticTrainer(tiny_backbone("dit"), brightness, PROMPTS, tiny_config())
    trainer.pretrain_critic()
    (directory / "checkpoints").mkdir()
    save_backbone(trainer.backbone, directory / "checkpoints" / "best")
    settings = {"train": {"sampler": SAMPLER | {"guidance_scale": 1.0}}}
    (directory / "run.json").write_text(json.dumps(settings), encoding="utf-8")
    return directory


def test_a_run_becomes_images_and_statistics(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "steered"
    arguments = ["steer", str(run), "--prompts", "one red circle", "two blue squares", "--samples", "3"]
    arguments += ["--method", "smc", "--particles", "2", "--selection", "reward", "--temperature", "0.3"]
    arguments += ["--rewards", "tiny_backbones:brightness", "--gold", "jpeg_incompressibility"]
    assert main([*arguments, "--out", str(out)]) == 0
    statistics = json.loads((out / "statistics.json").read_text(encoding="utf-8"))
    assert statistics["sampler"]["num_steps"] == 4
    assert statistics["evaluations_per_image"] == 2 * 4
    assert statistics["reward_calls"] == 2 * 3
    assert [row["prompt"] for row in statistics["images"]] == [
        "one red circle",
        "two blue squares",
        "one red circle",
    ]
    for row in statistics["images"]:
        assert Image.open(out / row["file"]).size == (32, 32)
        assert len(row["values"]) == 4
        assert row["scores"].keys() == {"brightness", "jpeg_incompressibility"}
    assert (out / "samples.png").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompts", "missing.txt"], "there is no prompt file 'missing.txt'"),
        (["--prompts", "a", "--selection", "reward"], "--selection reward has no reward to select by"),
        (["--prompts", "a", "--method", "genetic"], "unknown method 'genetic'"),
        (["--prompts", "a", "--rewards", "beauty"], "unknown reward 'beauty'"),
        (["--prompts", "a", "--gold", "shapes"], "reward 'shapes' cannot judge prompt 'a'"),
    ],
)
def test_what_cannot_work_is_one_line_before_the_model_is_loaded(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "steered"
    try:
        code = main(["steer", "no/such/model", *arguments, "--out", str(out)])
    except SystemExit as stopped:
        code = stopped.code
    assert code == USAGE
    assert message in capsys.readouterr().err
    assert not out.exists()


def test_prompts_are_a_source_or_the_texts_themselves() -> None:
    assert prompts_to_steer(["a cat", "a dog"], 0).texts == ["a cat", "a dog"]
    # Longer than a file's name may be.
    assert len(prompts_to_steer(["a cat " * 60], 0)) == 1
    assert prompts_to_steer(["a cat"], 2).texts == ["a cat", "a cat"]
    assert len(prompts_to_steer(["shapes-held-out"], 0)) == 60


def test_a_plain_pipeline_takes_a_critic_file(tmp_path: Path) -> None:
    settings = lacfast.PipelineSettings(resolution=(16, 16), max_sequence_length=16)
    backbone = lacfast.load_backbone(
        tiny_pipeline("sd3"), critic=CriticConfig(hidden_dim=16), num_rewards=2, settings=settings
    )
    critic = backbone.critic
    assert critic is not None
    nn.init.normal_(critic.head.output.weight)
    critic.reward_mean.copy_(torch.tensor([0.25, -3.0]))
    critic.reward_std.copy_(torch.tensor([2.0, 0.5]))
    sampler, config = SamplerConfig(num_steps=4), SteeringConfig(guidance_weight=0.05)
    weights = torch.tensor([1.0, -0.5])
    images, stats = lacfast.steer(
        backbone, PIPELINE_PROMPTS[:2], config, sampler=sampler, head_weights=weights
    )
    save_backbone(backbone, tmp_path / "saved")
    for critic_file in (tmp_path / "saved" / CRITIC_WEIGHTS, tmp_path / "saved"):
        plain = lacfast.load_backbone(tiny_pipeline("sd3"), critic_file=critic_file, settings=settings)
        assert plain.critic is not None
        assert torch.equal(plain.critic.reward_mean, critic.reward_mean)
        assert torch.equal(plain.critic.reward_std, critic.reward_std)
        again, again_stats = lacfast.steer(
            plain, PIPELINE_PROMPTS[:2], config, sampler=sampler, head_weights=weights
        )
        torch.testing.assert_close(again, images)
        torch.testing.assert_close(again_stats.values, stats.values)


def test_files_that_hold_no_critic_are_refused(tmp_path: Path) -> None:
    settings = lacfast.PipelineSettings(resolution=(16, 16), max_sequence_length=16)
    backbone = lacfast.load_backbone(tiny_pipeline("sd3"), settings=settings)
    save_backbone(backbone, tmp_path / "saved")
    with Refusal(
        "holds no critic.safetensors",
        cause="A directory that was saved without a critic.",
        remedy="pass a checkpoint or the file itself",
    ).raised():
        lacfast.load_backbone(tiny_pipeline("sd3"), critic_file=tmp_path / "saved", settings=settings)
    with Refusal(
        "none holds no critic",
        cause="A path where there is nothing.",
        remedy="pass the critic.safetensors that trainer.save() or save_backbone() wrote",
    ).raised():
        lacfast.load_backbone(tiny_pipeline("sd3"), critic_file=tmp_path / "none", settings=settings)
    with Refusal("are two critics", cause="A new critic and a file at once.", remedy="pass one").raised():
        lacfast.load_backbone(
            tiny_pipeline("sd3"), critic=CriticConfig(), critic_file=tmp_path / "saved", settings=settings
        )
    weights = next((tmp_path / "saved").rglob("*.safetensors"))
    with Refusal(
        "holds no critic", cause="A file of other weights.", remedy="pass the critic.safetensors"
    ).raised():
        lacfast.load_backbone(tiny_pipeline("sd3"), critic_file=weights, settings=settings)


def test_the_critic_knows_its_rewards_units(run: Path) -> None:
    critic = lacfast.load_backbone(run / "checkpoints" / "best").critic
    assert critic is not None
    assert 0 < float(critic.reward_std) < 1
    assert 0 < float(critic.reward_mean) < 1
