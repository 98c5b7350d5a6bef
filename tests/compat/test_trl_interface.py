"""What scripts written for TRL read, call and override beside `train`: there, or refused at construction."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig
from PIL import Image
from refusals import Refusal
from tiny_pipelines import load_pipeline, saved_pipeline, tiny_pipeline
from torch import Tensor

from lacfast.compat.trl import DDPOConfig, DDPOTrainer, DefaultDDPOStableDiffusionPipeline
from lacfast.compat.trl_tracking import HookLog
from lacfast.config import LoRAConfig
from lacfast.metrics import MetricsLog

Batch = list[Any]


def brightness(images: Tensor, prompts: tuple[str, ...], metadata: tuple[Any, ...]) -> tuple[Tensor, Any]:
    return images.mean(dim=(1, 2, 3)), {"judged": len(images)}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_pipeline("sd15", tmp_path_factory.mktemp("trl") / "base")


def trainer_of(
    base: Path | str,
    directory: Path,
    *,
    kind: type[DDPOTrainer] = DDPOTrainer,
    use_lora: bool = False,
    **settings: Any,
) -> DDPOTrainer:
    defaults = {"sample_num_steps": 3, "sample_batch_size": 2, "mixed_precision": None, "save_freq": 10**6}
    config = DDPOConfig(logdir=str(directory), **(defaults | settings))
    pipeline = DefaultDDPOStableDiffusionPipeline(str(base), use_lora=use_lora)
    return kind(config, brightness, lambda: ("a red cat", {}), pipeline)


@pytest.mark.parametrize("use_lora", [False, True])
def test_transitions_can_be_sampled_judged_and_learned_from_by_hand(
    base: Path, tmp_path: Path, use_lora: bool
) -> None:
    trainer = trainer_of(base, tmp_path, use_lora=use_lora)
    samples, pairs = trainer._generate_samples(2, 2)
    assert len(samples) == len(pairs) == 2
    images, prompts, metadata = pairs[0]
    assert (images.shape, prompts, metadata) == ((2, 3, 16, 16), ("a red cat",) * 2, ({}, {}))
    sample = samples[0]
    assert {name: tuple(tensor.shape[:2]) for name, tensor in sample.items()} == {
        "prompt_ids": (2, 12),
        "prompt_embeds": (2, 12),
        "negative_prompt_embeds": (2, 12),
        "timesteps": (2, 3),
        "latents": (2, 3),
        "next_latents": (2, 3),
        "log_probs": (2, 3),
    }
    assert torch.equal(sample["latents"][:, 1:], sample["next_latents"][:, :-1])
    rewards, about = trainer.compute_rewards(pairs)
    torch.testing.assert_close(rewards[0], brightness(*pairs[0])[0])
    assert about == ({"judged": 2},) * 2
    again, _ = trainer.compute_rewards(pairs, is_async=True)
    assert torch.equal(torch.cat(rewards), torch.cat(again))
    embeds = torch.cat([sample["negative_prompt_embeds"], sample["prompt_embeds"]])
    transition = [sample[name][:, 1] for name in ("latents", "timesteps", "next_latents", "log_probs")]
    loss, approximate_kl, clipped = trainer.calculate_loss(*transition, torch.tensor([1.0, -3.0]), embeds)
    # The same weights: every ratio is 1, up to the rounding of a log-prob.
    assert float(loss.detach()) == pytest.approx(1.0, abs=1e-3)
    assert float(approximate_kl.detach()) < 1e-6
    assert 0 <= float(clipped) <= 1
    loss.backward()
    gradients = [weight.grad for weight in trainer.engine.backbone.policy_parameters()]
    assert any(gradient is not None and gradient.abs().sum() > 0 for gradient in gradients)


def test_the_loss_is_the_larger_of_the_plain_and_the_clipped_one(base: Path, tmp_path: Path) -> None:
    trainer = trainer_of(base, tmp_path)
    assert trainer.loss(torch.tensor([-1.0]), 1e-4, torch.tensor([1.0])).item() == 1.0
    advantages, ratio = torch.tensor([2.0, 2.0, -2.0, -2.0]), torch.tensor([1.5, 0.5, 1.5, 0.5])
    assert trainer.loss(advantages, 0.1, ratio).item() == pytest.approx((-2.2 - 1.0 + 3.0 + 1.8) / 4)


def test_the_wrapper_is_a_pipeline_with_log_probs(base: Path) -> None:
    wrapper = DefaultDDPOStableDiffusionPipeline(str(base), use_lora=False)
    wrapper.set_progress_bar_config(disable=True)
    output = wrapper(prompt=["a red cat"] * 2, num_inference_steps=2, eta=1.0, output_type="pil")
    assert [image.size for image in output.images] == [(16, 16)] * 2
    assert (len(output.latents), len(output.log_probs)) == (3, 2)
    timestep = wrapper.scheduler.timesteps[0]
    step = wrapper.scheduler_step(
        torch.zeros_like(output.latents[0]),
        timestep,
        output.latents[0],
        eta=1.0,
        prev_sample=output.latents[1],
    )
    assert torch.equal(step.latents, output.latents[1])
    assert step.log_probs.shape == (2,)
    parts = (wrapper.unet, wrapper.vae, wrapper.tokenizer, wrapper.text_encoder)
    assert parts == tuple(
        getattr(wrapper.sd_pipeline, name) for name in ("unet", "vae", "tokenizer", "text_encoder")
    )
    assert wrapper.autocast is None


def test_a_config_becomes_a_flat_dict() -> None:
    config = DDPOConfig(seed=4, project_kwargs={"total_limit": 2})
    flat = config.to_dict()
    assert (flat["seed"], flat["project_kwargs/total_limit"]) == (4, 2)
    # Empty dicts have nothing to say.
    assert not {"project_kwargs", "tracker_kwargs"} & set(flat)


def test_a_lora_in_the_models_folder_goes_on(tmp_path: Path) -> None:
    folder = saved_pipeline("sd15", tmp_path / "base")
    first = trainer_of(folder, tmp_path / "first", use_lora=True, train_learning_rate=1e-2)
    first.train(1)
    first.save_pretrained(tmp_path / "adapter")
    trained = {name: tensor.clone() for name, tensor in first.engine.backbone.policy_state().items()}
    (tmp_path / "adapter" / "pytorch_lora_weights.safetensors").rename(
        folder / "pytorch_lora_weights.safetensors"
    )
    # As with TRL, it is trained whatever use_lora says.
    second = trainer_of(folder, tmp_path / "second")
    assert second.engine.backbone.lora == LoRAConfig(
        rank=4, target_modules=second.engine.backbone.lora.target_modules
    )
    continued = second.engine.backbone.policy_state()
    assert set(continued) == set(trained)
    assert all(torch.equal(continued[name], trained[name]) for name in trained)
    wrapper = DefaultDDPOStableDiffusionPipeline(str(folder))
    with pytest.raises(ValueError, match="a LoRA in the model's folder goes on; leave lora out"):
        DDPOTrainer(second.config, brightness, lambda: ("red", {}), wrapper, lora=LoRAConfig(rank=2))


def test_a_lora_in_the_models_folder_that_is_more_than_a_plain_one_is_refused(tmp_path: Path) -> None:
    folder = saved_pipeline("sd15", tmp_path / "base")
    wrapper = DefaultDDPOStableDiffusionPipeline(str(folder), use_lora=False)
    config = DDPOConfig(logdir=str(tmp_path), mixed_precision="no")
    settings = LoraConfig(r=2, target_modules=["to_q"], use_dora=True)
    wrapper.sd_pipeline.unet.add_adapter(settings, adapter_name="first")
    with Refusal(
        "the LoRA of the pipeline is no plain one but a",
        cause="TRL's wrapper holds a DoRA, a LoKr or a LoRA with biases.",
        remedy="pipeline.fuse_lora()",
    ).raised():
        DDPOTrainer(config, brightness, lambda: ("red", {}), wrapper)
    plain = LoraConfig(r=2, target_modules=["to_q"])
    wrapper.sd_pipeline.unet.add_adapter(plain, adapter_name="second")
    with Refusal(
        "the pipeline has the LoRAs ['first', 'second'], and one is trained",
        cause="TRL's wrapper holds several LoRAs.",
        remedy="merge them: pipeline.fuse_lora()",
    ).raised():
        DDPOTrainer(config, brightness, lambda: ("red", {}), wrapper)


class OwnLoss(DDPOTrainer):
    def loss(self, advantages: Tensor, clip_range: float, ratio: Tensor) -> Tensor:
        return -(advantages * ratio).mean()


class OwnCall(DefaultDDPOStableDiffusionPipeline):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise AssertionError("was called")


def test_overrides_that_nothing_would_call_are_refused(base: Path, tmp_path: Path) -> None:
    with Refusal(
        "OwnLoss has its own loss, which would not be called",
        cause="A subclass of TRL's trainer with another loss.",
        remedy="override compute_rewards, step or train",
    ).raised():
        trainer_of(base, tmp_path, kind=OwnLoss)
    config = DDPOConfig(logdir=str(tmp_path), mixed_precision="no")
    with Refusal(
        "OwnCall has its own __call__, which would not be called",
        cause="A wrapper of TRL's with a way of sampling of its own.",
        remedy="pass that pipeline, and an adapter by lora=",
    ).raised():
        DDPOTrainer(config, brightness, lambda: ("red", {}), OwnCall(str(base), use_lora=False))


def test_compute_rewards_may_be_overridden(base: Path, tmp_path: Path) -> None:
    class Doubled(DDPOTrainer):
        def compute_rewards(self, prompt_image_pairs: list[Batch], is_async: bool = False) -> Any:
            rewards, about = super().compute_rewards(prompt_image_pairs, is_async)
            return tuple(2 * reward for reward in rewards), about

    engines = [
        trainer_of(base, tmp_path / kind.__name__, kind=kind).engine for kind in (DDPOTrainer, Doubled)
    ]
    rollouts = [engine.collect(engine.prompts.draw(4, seed=0, iteration=0), 0) for engine in engines]
    plain, doubled = (rollout.rewards["brightness"] for rollout in rollouts if rollout is not None)
    assert torch.equal(2 * plain, doubled)


def test_the_accelerator_is_one_process(base: Path, tmp_path: Path) -> None:
    trainer = trainer_of(base, tmp_path)
    accelerator = trainer.accelerator
    assert (accelerator.device, accelerator.is_main_process, accelerator.num_processes) == (
        trainer.engine.device,
        True,
        1,
    )
    assert accelerator.gather(trainer) is trainer
    accelerator.log({"own": torch.tensor(0.5), "count": np.int64(3)}, step=7)
    line = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert (line["phase"], line["step"], line["own"], line["count"]) == ("hook", 7, 0.5, 3)
    with pytest.raises(AttributeError, match=r"no accelerator\.backward.*trainer\.engine"):
        accelerator.backward(torch.zeros(()))


PIXELS = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)


@pytest.mark.parametrize(
    "images",
    [
        torch.from_numpy(PIXELS).permute(2, 0, 1)[None] / 255,
        torch.from_numpy(PIXELS).permute(2, 0, 1),
        PIXELS[None],
        PIXELS.transpose(2, 0, 1)[None] / 255,
        [PIXELS],
        Image.fromarray(PIXELS),
        [Image.fromarray(PIXELS)],
    ],
)
def test_a_hook_may_log_tensors_arrays_and_pil_images(tmp_path: Path, images: Any) -> None:
    HookLog(tmp_path, MetricsLog(None)).log({"red | 0.5": images, "loss": 1.0}, step=3)
    (path,) = tmp_path.glob("*/*.png")
    assert path.relative_to(tmp_path) == Path("00000003/000-0-red_0.5.png")
    assert np.array_equal(np.asarray(Image.open(path)), PIXELS)


@pytest.mark.parametrize(
    ("values", "refusal"),
    [
        (
            {"table": {"a": 1}},
            Refusal(
                "'table' is a dict, which cannot be logged",
                cause="A hook that logs something else than numbers and images.",
                remedy="pass numbers, or images as tensors",
            ),
        ),
        (
            {"batch": np.zeros((5, 5))},
            Refusal(
                "has an image of shape (5, 5)",
                cause="A hook that logs an image without channels.",
                remedy="pass one or three channels",
            ),
        ),
        (
            {"iteration": 3},
            Refusal(
                "metrics.jsonl has ['iteration'] of its own",
                cause="A hook that logs a number by a name of the log's own.",
                remedy="log them by other names",
            ),
        ),
    ],
)
def test_what_a_hook_cannot_log_is_named(tmp_path: Path, values: dict[str, Any], refusal: Refusal) -> None:
    with refusal.raised():
        HookLog(tmp_path, MetricsLog(None)).log(values)


class Hub:
    """Records what the hub would get."""

    told: list[tuple[Any, ...]]

    def __init__(self, token: str | None = None) -> None:
        self.told.append(("login", token))

    def create_repo(self, repo_id: str, *, private: bool | None, exist_ok: bool) -> Any:
        self.told.append(("repo", repo_id, private))
        return SimpleNamespace(repo_id=f"me/{repo_id}")

    def upload_folder(self, *, repo_id: str, folder_path: Path, **settings: Any) -> Any:
        self.told.append(
            ("files", repo_id, (Path(folder_path) / "pytorch_lora_weights.safetensors").exists())
        )
        return SimpleNamespace(commit_url=f"https://hub/{repo_id}")


def test_weights_are_uploaded_on_request(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Hub.told = []
    monkeypatch.setattr("lacfast.backbones.publishing.HfApi", Hub)
    trainer = trainer_of(base, tmp_path, use_lora=True)
    assert trainer.push_to_hub("cats", private=True, token="key") == "https://hub/me/cats"
    trainer.save_pretrained(tmp_path / "dogs", push_to_hub=True)
    assert Hub.told == [
        ("login", "key"),
        ("repo", "cats", True),
        ("files", "me/cats", True),
        ("login", None),
        ("repo", "dogs", None),
        ("files", "me/dogs", True),
    ]
    plain = load_pipeline(base)
    plain.load_lora_weights(tmp_path / "dogs")
    with pytest.raises(ValueError, match=r"\['private'\] would be ignored; set push_to_hub=True"):
        trainer.save_pretrained(tmp_path / "birds", private=True)


def test_pushing_without_a_login_is_refused_before_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lacfast.compat.trl_config.get_token", lambda: None)
    config = DDPOConfig(logdir=str(tmp_path), mixed_precision="no", push_to_hub=True)
    with Refusal(
        "push_to_hub=True without a login to the hub",
        cause="A TRL script that uploads its result, on a machine that is not logged in.",
        remedy="run `hf auth login` or set HF_TOKEN",
    ).raised():
        DDPOTrainer(config, brightness, lambda: ("red", {}), tiny_pipeline("sd15"))
