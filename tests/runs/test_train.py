"""A run keeps what it should, and one that was killed goes on as if it had not been."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub import cached_assets_path
from PIL import Image
from refusals import Refusal
from safetensors.torch import load_file
from tiny_pipelines import PROMPTS, tiny_pipeline

from lacfast.backbones import load_backbone, prompt_files
from lacfast.backbones.pipelines import PipelineEncoder
from lacfast.config import (
    CriticConfig,
    LoRAConfig,
    PipelineSettings,
    PPOConfig,
    SamplerConfig,
    TrainConfig,
    ValuePretrainingConfig,
    from_json,
    variant,
)
from lacfast.metrics import curve_points
from lacfast.prompts import Draws, PromptSet
from lacfast.runs import train as run
from lacfast.runs.config import EvaluationRun, RunConfig
from lacfast.runs.directory import RunDirectory
from lacfast.runs.evaluate import evaluate_model
from lacfast.runs.plan import plan
from lacfast.runs.terminal import PhaseLog


class StoppedError(Exception):
    """In place of a kill."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("sd3")
    tiny_pipeline("sd3").save_pretrained(directory)
    (directory / "prompts.txt").write_text("\n".join(PROMPTS), encoding="utf-8")
    return directory


@pytest.fixture
def unplanned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs do not ask for the memory that they take, which is most of their time."""
    monkeypatch.setattr(run, "_require_memory", lambda *_: None)


def run_config(model: Path, out: Path, **changes: Any) -> RunConfig:
    config = RunConfig(
        out=str(out),
        model=str(model),
        prompts=str(model / "prompts.txt"),
        rewards=(("jpeg_incompressibility", 1.0),),
        lora=LoRAConfig(rank=2),
        pipeline=PipelineSettings(resolution=(16, 16), max_sequence_length=16),
        save_every=1,
        train=TrainConfig(
            batch_size=4,
            rollout_batch_size=2,
            iterations=4,
            sampler=SamplerConfig(num_steps=3),
            critic=CriticConfig(trunk="branch", hidden_dim=16, num_heads=2, head_dim=8),
            ppo=PPOConfig(
                num_minibatches=2, warmup_steps=3, policy_learning_rate=1e-3, final_learning_rate=1e-4
            ),
            pretrain=ValuePretrainingConfig(iterations=1, held_out_samples=4, minibatch_size=8),
            ema_decay=0.5,
            eval_every=2,
            eval_samples=4,
            eval_sampler=SamplerConfig(kind="ode", num_steps=4, noise_level=0.0),
        ),
    )
    return replace(config, **changes)


def lines(out: Path) -> list[dict[str, Any]]:
    entries = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [
        {name: value for name, value in entry.items() if not name.startswith("seconds")} for entry in entries
    ]


def stop_after(count: int) -> Any:
    def callback(metrics: dict[str, Any]) -> None:
        if metrics["iteration"] == count:
            raise StoppedError

    return callback


def test_a_run_that_was_killed_ends_bit_for_bit_like_one_that_was_not(model: Path, tmp_path: Path) -> None:
    through = run.train(run_config(model, tmp_path / "through"))
    with pytest.raises(StoppedError):
        run.train(run_config(model, tmp_path / "killed", save_every=2), stop_after(3))
    resumed = run.train(run_config(model, tmp_path / "killed", save_every=2))
    for name in ("pytorch_lora_weights.safetensors", "critic.safetensors"):
        expected, found = load_file(through / name), load_file(resumed / name)
        assert all(torch.equal(expected[key], found[key]) for key in expected)
    assert lines(tmp_path / "killed") == lines(tmp_path / "through")


@pytest.mark.usefixtures("unplanned")
def test_a_run_goes_on_from_a_trained_lora_beside_merged_ones(model: Path, tmp_path: Path) -> None:
    short = {"train": replace(run_config(model, tmp_path).train, iterations=2)}
    first = run.train(run_config(model, tmp_path / "first", **short))
    merged = ((str(first), 0.5),)
    second = run_config(
        model, tmp_path / "second", lora=None, lora_from=str(first), merged_loras=merged, **short
    )
    assert plan(second).costs == plan(run_config(model, tmp_path / "first", **short)).costs
    with pytest.raises(StoppedError):
        run.train(second, stop_after(1))
    last = run.train(second)
    backbone = load_backbone(last)
    assert backbone.lora == LoRAConfig(rank=2, target_modules=backbone.lora.target_modules)
    assert json.loads((last / "lacfast.json").read_text())["merged_loras"] == {str(first): 0.5}
    before, after = (load_file(each / "pytorch_lora_weights.safetensors") for each in (first, last))
    assert before.keys() == after.keys()
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert any(".lora_A." in name for name in changed)
    assert any(".lora_B." in name for name in changed)


@pytest.mark.usefixtures("unplanned")
def test_a_run_begins_with_the_critic_of_another_one(model: Path, tmp_path: Path) -> None:
    train = replace(run_config(model, tmp_path).train, iterations=1)
    run.train(run_config(model, tmp_path / "taught", train=train))
    taught = tmp_path / "taught" / "checkpoints" / f"{0:08d}"
    whole = run_config(model, tmp_path / "run", critic_from=str(taught), train=train)
    config = variant(whole, value_pretraining=False)
    run.train(config)
    first = tmp_path / "run" / "checkpoints" / f"{0:08d}"
    before, after = (load_file(each / "critic.safetensors") for each in (taught, first))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    other = replace(config, out=str(tmp_path / "none"), rewards=(("jpeg_compressibility", 1.0),))
    with pytest.raises(ValueError, match=r"is of rewards \['jpeg_incompressibility'\].*begin with a new"):
        run.train(other)
    with pytest.raises(ValueError, match=r"holds no critic\.safetensors; pass a checkpoint"):
        run.train(replace(config, out=str(tmp_path / "none"), critic_from=str(model)))
    assert not (tmp_path / "none").exists()


@pytest.mark.usefixtures("unplanned")
def test_encoders_that_are_set_aside_change_no_bit_and_a_second_run_encodes_nothing(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded: list[str] = []
    encode = PipelineEncoder.encode

    def counted(self: PipelineEncoder, prompts: Any) -> Any:
        encoded.extend(dict.fromkeys(prompts))
        return encode(self, prompts)

    monkeypatch.setattr(PipelineEncoder, "encode", counted)
    assets = partial(cached_assets_path, assets_dir=tmp_path / "assets")
    monkeypatch.setattr(prompt_files, "cached_assets_path", assets)
    short = {"train": replace(run_config(model, tmp_path).train, iterations=1, eval_samples=2)}
    prompts, found = PromptSet.create(model / "prompts.txt"), []
    draws = Draws(prompts, prompts, short["train"])
    drawn = {
        text for draw in (draws.selection(), draws.pretraining(0), *draws.upcoming(0)) for text in draw.texts
    }
    assert len(drawn) < len(prompts)
    for name in ("kept", "cold", "warm"):
        encoded.clear()
        config = run_config(model, tmp_path / name, keep_text_encoders=name == "kept", **short)
        told: list[str] = []
        found.append(load_file(run.train(config, tell=told.append) / "pytorch_lora_weights.safetensors"))
        place = f"MiB each, in {tmp_path / 'assets' / 'lacfast' / 'prompts'}"
        assert any(place in line for line in told) == (name != "kept")
        assert sorted(encoded) == (sorted(drawn) if name != "warm" else [])
    for other in found[1:]:
        assert all(torch.equal(found[0][key], other[key]) for key in found[0])


def test_it_keeps_the_last_checkpoints_the_best_one_and_pictures(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    run.train(run_config(model, out, keep_last=2))
    kept = sorted(path.name for path in (out / "checkpoints").iterdir())
    assert kept == ["00000003", "00000004", "best"]
    scores = [entry["jpeg_incompressibility"] for entry in lines(out) if entry["phase"] == "evaluate"]
    assert json.loads((out / "checkpoints" / "best" / "score.json").read_text())["score"] == max(scores)
    assert [entry["iteration"] for entry in lines(out) if entry["phase"] == "evaluate"] == [0, 2, 4]
    with Image.open(out / "samples" / "00000004.png") as picture:
        assert picture.width > 4 * 16
    assert json.loads((out / "run.json").read_text())["train"]["iterations"] == 4


def test_a_new_run_does_not_mix_with_an_old_one(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    whole = run_config(model, out)
    train = replace(whole.train, iterations=1, eval_every=0)
    short = variant(whole, value_pretraining=False, train=train)
    run.train(short)
    with pytest.raises(ValueError, match="already holds a run"):
        run.train(replace(short, resume="never"))
    with pytest.raises(ValueError, match=r"no trainer\.pt"):
        run.train(replace(short, resume=str(tmp_path / "nowhere")))


def test_an_unknown_best_score_is_refused_with_the_known_ones(model: Path, tmp_path: Path) -> None:
    wrong = run_config(model, tmp_path / "run", best="beauty")
    with pytest.raises(ValueError, match="jpeg_incompressibility"):
        run.train(wrong)


@pytest.mark.parametrize("name", ["sampler", "eval_sampler"])
def test_a_tiny_model_s_sampler_is_refused_before_its_pretraining(name: str, tmp_path: Path) -> None:
    wrong = RunConfig(
        out=str(tmp_path / "run"), model="shapes-dit", prompts="shapes", rewards=(("shapes", 1.0),)
    )
    sampler = SamplerConfig(kind="ddim", noise_level=0.5)
    refusal = Refusal(
        "is a flow, and train.",
        cause="A sampler of diffusion models for a tiny model, which is a flow.",
        remedy="is for diffusion models; use one of cps, dance_sde, flow_ddim, flow_sde, ode",
    )
    with refusal.raised() as caught:
        run.train(replace(wrong, train=replace(wrong.train, **{name: sampler})))
    assert f"train.{name}.kind='ddim'" in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_run_that_goes_on_is_the_same_for_weights_and_biases(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[dict[str, Any]] = []

    def init(**settings: Any) -> SimpleNamespace:
        opened.append(settings)
        return SimpleNamespace(finish=lambda: None)

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    config = run_config(model, tmp_path / "run", wandb_project="cats")
    for is_new in (True, False, True):
        directory = RunDirectory(tmp_path / "run", keep_last=1)
        if is_new:
            directory.begin()
            directory.write_settings({})
        run.build_trainer(config, directory, PhaseLog()).close()
    first, second, third = (settings["id"] for settings in opened)
    assert first == second != third
    assert {settings["resume"] for settings in opened} == {"allow"}


def test_a_run_is_evaluated_as_it_evaluated_itself(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    config = run_config(model, out)
    run.train(config)
    best = json.loads((out / "checkpoints" / "best" / "score.json").read_text())["score"]
    assert config.train.eval_sampler is not None
    evaluation = evaluate_model(
        EvaluationRun(
            source=str(out),
            prompts=config.prompts,
            rewards=("jpeg_incompressibility",),
            samples=4,
            batch_size=4,
            device="cpu",
            out=tmp_path / "scores",
        )
    )
    assert evaluation.means()["jpeg_incompressibility"] == pytest.approx(best, rel=1e-3)
    assert (tmp_path / "scores" / "samples.png").exists()
    scores = json.loads((tmp_path / "scores" / "scores.json").read_text())
    assert from_json(SamplerConfig, scores["sampler"]) == config.train.eval_sampler


def test_curves_name_the_phase_and_the_step() -> None:
    values = {"iteration": 3, "loss": 0.5, "skipped": True, "kl": torch.tensor([1.0, 2.0]), "name": "x"}
    assert curve_points("train", values) == {
        "train/loss": 0.5,
        "train/skipped": 1.0,
        "train/kl/00": 1.0,
        "train/kl/01": 2.0,
    }


def test_trackers_get_numbers_and_pictures(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Recorder:
        def __init__(self, directory: Path) -> None:
            self.points: dict[int, dict[str, float]] = {}
            self.pictures: list[int] = []
            self.closed = False
            made.append(self)

        def numbers(self, step: int, values: dict[str, float]) -> None:
            self.points.setdefault(step, {}).update(values)

        def picture(self, step: int, name: str, image: Image.Image) -> None:
            self.pictures.append(step)

        def close(self) -> None:
            self.closed = True

    made: list[Recorder] = []
    monkeypatch.setattr(run, "TensorBoardTracker", Recorder)
    run.train(run_config(model, tmp_path / "run", tensorboard=True))
    (recorder,) = made
    assert recorder.closed
    # An iteration of value pretraining comes before.
    assert recorder.pictures == [1, 3, 5]
    assert "value_pretraining/explained_variance/00" in recorder.points[0]
    assert {"train/reward/jpeg_incompressibility", "train/policy_loss"} <= recorder.points[2].keys()
    assert "evaluate/jpeg_incompressibility" in recorder.points[5]
