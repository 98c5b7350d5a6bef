"""TRL's trainer on our engine: its settings mapped or refused, its callbacks, its loss, resume and export."""

from __future__ import annotations

import json
import random
import threading
import warnings
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from tiny_pipelines import PROMPTS, load_pipeline, saved_pipeline, tiny_pipeline
from torch import Tensor

from lacfast.compat.ddpo import PerPromptStatTracker, ddim_step_with_logprob
from lacfast.compat.trl import DDPOConfig, DDPOTrainer, DefaultDDPOStableDiffusionPipeline
from lacfast.compat.trl_config import train_config
from lacfast.compat.trl_tracking import HookLog
from lacfast.config import CriticConfig, Ratio

SMALL: dict[str, Any] = {
    "mixed_precision": "no",
    "num_epochs": 2,
    "sample_num_steps": 3,
    "sample_guidance_scale": 3.0,
    "sample_batch_size": 4,
    "sample_num_batches_per_epoch": 2,
    "train_batch_size": 4,
    "train_learning_rate": 1e-3,
}


FAST: dict[str, Any] = {
    "sample_num_steps": 2,
    "sample_guidance_scale": 1.0,
    "sample_num_batches_per_epoch": 1,
}
"""One optimizer step per epoch."""


def redness(
    images: Tensor, prompts: tuple[str, ...], metadata: tuple[Any, ...]
) -> tuple[Tensor, dict[str, int]]:
    assert isinstance(prompts, tuple)
    assert len(images) == len(prompts) == len(metadata) == 4
    assert 0 <= float(images.min()) <= float(images.max()) <= 1
    return images[:, 0].mean(dim=(1, 2)) - images[:, 1].mean(dim=(1, 2)), {"batch": len(images)}


def any_prompt() -> tuple[str, dict[str, float]]:
    return random.choice(PROMPTS), {"number": float(np.random.rand())}


def trainer_in(directory: Path, pipeline: Any = None, reward: Any = redness, **changes: Any) -> DDPOTrainer:
    keywords = {name: changes.pop(name) for name in ("image_samples_hook", "critic") if name in changes}
    config = DDPOConfig(**(SMALL | {"logdir": str(directory)} | changes))
    return DDPOTrainer(config, reward, any_prompt, pipeline or tiny_pipeline("sd15"), **keywords)


def weights_of(trainer: DDPOTrainer) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in trainer.engine.backbone.policy_parameters()]


def metrics_of(directory: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["phase"] == "train"]


def test_every_setting_of_trl_arrives() -> None:
    config = DDPOConfig(
        seed=3,
        mixed_precision="bf16",
        num_epochs=7,
        sample_num_steps=20,
        sample_eta=0.8,
        sample_guidance_scale=4.0,
        sample_batch_size=6,
        sample_num_batches_per_epoch=4,
        train_batch_size=3,
        train_gradient_accumulation_steps=2,
        train_learning_rate=1e-5,
        train_adam_beta1=0.8,
        train_adam_beta2=0.99,
        train_adam_weight_decay=1e-3,
        train_adam_epsilon=1e-10,
        train_max_grad_norm=0.5,
        train_num_inner_epochs=2,
        train_adv_clip_max=4.0,
        train_clip_range=1e-3,
        train_timestep_fraction=0.5,
    )
    ours = train_config(config)
    assert (ours.seed, ours.iterations, ours.critic.trunk) == (3, 7, "none")
    assert (ours.batch_size, ours.rollout_batch_size) == (24, 6)
    sampler, ppo = ours.sampler, ours.ppo
    assert (sampler.kind, sampler.num_steps, sampler.noise_level) == ("ddim", 20, 0.8)
    assert (sampler.guidance_scale, sampler.stochastic_window) == (4.0, (0, 20))
    assert (ppo.num_minibatches, ppo.microbatch_size, ppo.num_inner_epochs) == (4, 3, 2)
    assert (ppo.policy_learning_rate, ppo.betas, ppo.weight_decay) == (1e-5, (0.8, 0.99), 1e-3)
    assert (ppo.adam_eps, ppo.max_grad_norm, ppo.advantage_clip) == (1e-10, 0.5, 4.0)
    assert (ppo.clip, ppo.timestep_fraction, ppo.cfg_grad) == (Ratio(1e-3), 0.5, "both")
    assert config.dtype == torch.bfloat16


def test_the_defaults_are_trls() -> None:
    config = DDPOConfig()
    named = {field.name: getattr(config, field.name) for field in fields(config)}
    assert len(named) == 41
    assert (named["sample_num_steps"], named["sample_eta"], named["sample_guidance_scale"]) == (50, 1.0, 5.0)
    assert (named["train_learning_rate"], named["train_clip_range"]) == (3e-4, 1e-4)
    with pytest.warns(UserWarning, match="bfloat16"):
        assert train_config(config).batch_size == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"log_with": "mlflow"}, "known: None, 'tensorboard', 'wandb'"),
        ({"tracker_kwargs": {"wandb": {}}}, "tracker_kwargs"),
        ({"accelerator_kwargs": {"cpu": True}}, "accelerator_kwargs"),
        ({"project_kwargs": {"iteration": 3}}, r"\['iteration'\]; known: automatic_checkpoint_naming"),
        ({"train_use_8bit_adam": True}, "8bit_adam"),
        ({"train_cfg": False}, "sample_guidance_scale=1"),
        ({"mixed_precision": "fp8"}, "known: 'no', 'bf16', 'fp16'"),
        ({"train_batch_size": 3}, "4 must be a multiple of 3"),
        ({"train_gradient_accumulation_steps": 3}, "8 must be a multiple of 12"),
        ({"sample_guidance_scale": 0.5}, "guidance_scale=0.5"),
    ],
)
def test_settings_that_would_be_ignored_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train_config(DDPOConfig(**(SMALL | settings)))


def test_a_prompt_baseline_beside_a_critic_is_refused() -> None:
    with pytest.raises(ValueError, match="beside a critic"):
        train_config(DDPOConfig(**SMALL, per_prompt_stat_tracking=True), CriticConfig())


def test_no_noise_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"sample_eta=0\.0 must lie in"):
        trainer_in(tmp_path, sample_eta=0.0)


def test_it_trains_and_shows_its_batches_before_each_update(tmp_path: Path) -> None:
    seen: list[tuple[int, list[list[Any]]]] = []

    def hook(batches: list[list[Any]], global_step: int, log: HookLog) -> None:
        assert all(torch.equal(*pair) for pair in zip(weights_of(trainer), current, strict=True))
        seen.append((global_step, batches))
        images, prompts, _, rewards, _ = batches[-1]
        log.log_images({f"{prompts[0]} | {rewards[0]:.2f}": images[:1]}, step=global_step)

    pipeline = tiny_pipeline("sd15")
    # As the wrapper has it, so that there is nothing to be warned of.
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        trainer = trainer_in(tmp_path, pipeline, image_samples_hook=hook)
    current = weights_of(trainer)
    assert trainer.step(0, 0) == 2
    assert not all(torch.equal(*pair) for pair in zip(weights_of(trainer), current, strict=True))
    current = weights_of(trainer)
    assert trainer.step(1, 2) == 4
    assert [global_step for global_step, _ in seen] == [0, 2]
    for _, batches in seen:
        assert len(batches) == 2
        for images, prompts, metadata, rewards, about in batches:
            assert images.shape == (4, 3, 16, 16)
            assert len(set(prompts) - set(PROMPTS)) == 0
            assert len({entry["number"] for entry in metadata}) == 4
            torch.testing.assert_close(rewards, redness(images, prompts, metadata)[0])
            assert about == {"batch": 4}
    first = metrics_of(tmp_path)[0]
    # The forwards of 8 and of 4 samples may differ in their last bits.
    assert first["first_max_abs_log_ratio"] < 1e-5
    shown = torch.cat([torch.as_tensor(batch[3]) for batch in seen[0][1]])
    assert first["reward/redness"] == pytest.approx(float(shown.mean()), abs=1e-6)
    assert len(list((tmp_path / "samples").glob("*/*.png"))) == 2


def test_prompts_depend_on_seed_and_epoch_alone(tmp_path: Path) -> None:
    prompts = trainer_in(tmp_path).engine.prompts
    random.seed(9)
    before = random.getstate()
    first = prompts.draw(8, seed=0, iteration=1)
    assert random.getstate() == before
    random.seed(10)
    assert prompts.draw(8, seed=0, iteration=1) == first
    assert prompts.draw(8, seed=0, iteration=2) != first


def test_the_first_gradient_is_trls(tmp_path: Path) -> None:
    """Against TRL's loss on the rollout's latents, step by step, with our DDIM drop-in and autograd."""
    trainer = trainer_in(
        tmp_path, train_gradient_accumulation_steps=2, train_max_grad_norm=1e9, train_learning_rate=0.0
    )
    engine, config = trainer.engine, trainer.config
    rollout = engine.collect(engine.prompts.draw(8, seed=0, iteration=0), 0)
    assert rollout is not None
    model, scheduler = trainer.sd_pipeline.unet, engine.backbone.scheduler
    scheduler.set_timesteps(config.sample_num_steps)
    rewards = next(iter(rollout.rewards.values()))
    advantages = ((rewards - rewards.mean()) / rewards.std(correction=0)).clamp(-5, 5)
    embeds = trainer.sd_pipeline.encode_prompt(rollout.prompts, torch.device("cpu"), 1, True)
    losses = []
    for step in engine.advantages(rollout).steps.tolist():
        timestep = scheduler.timesteps[step]
        cond, uncond = (model(rollout.latents[step], timestep, half)[0] for half in embeds)
        output = uncond + config.sample_guidance_scale * (cond - uncond)
        log_prob = ddim_step_with_logprob(
            scheduler, output, timestep, rollout.latents[step], 1.0, prev_sample=rollout.latents[step + 1]
        )[1]
        losses.append(-advantages * (log_prob - log_prob.detach()).exp())
    expected = torch.autograd.grad(torch.stack(losses).mean(), list(model.parameters()))
    engine.update(rollout)
    largest = max(gradient.abs().max() for gradient in expected)
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        assert parameter.grad is not None
        assert (parameter.grad - gradient).abs().max() < 1e-4 * largest


def test_prompts_can_have_baselines_of_their_own(tmp_path: Path) -> None:
    trainer = trainer_in(
        tmp_path,
        per_prompt_stat_tracking=True,
        per_prompt_stat_tracking_buffer_size=4,
        per_prompt_stat_tracking_min_count=2,
    )
    tracker, engine = PerPromptStatTracker(4, 2), trainer.engine
    for epoch in range(2):
        rollout = engine.collect(engine.prompts.draw(8, seed=0, iteration=epoch), 8 * epoch)
        assert rollout is not None
        expected = tracker.update(rollout.prompts, next(iter(rollout.rewards.values())).double().numpy())
        ours = engine.advantages(rollout)
        torch.testing.assert_close(ours.policy[0].double(), torch.from_numpy(expected).clamp(-5, 5))
        assert torch.equal(ours.policy, ours.policy[:1].expand_as(ours.policy))


def test_a_run_goes_on_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    tracking: dict[str, Any] = {
        "per_prompt_stat_tracking": True,
        "per_prompt_stat_tracking_min_count": 2,
        **FAST,
    }
    whole = trainer_in(tmp_path / "whole", num_epochs=3, **tracking)
    whole.train()
    trainer_in(tmp_path / "parts", **tracking).train()
    resumed = trainer_in(
        tmp_path / "parts", num_epochs=3, resume_from=str(tmp_path / "parts" / "checkpoints"), **tracking
    )
    assert (resumed.first_epoch, resumed.global_step) == (2, 2)
    resumed.train()
    assert resumed.global_step == whole.global_step == 3
    for one, other in zip(weights_of(whole), weights_of(resumed), strict=True):
        assert torch.equal(one, other)


def test_only_the_latest_checkpoints_stay(tmp_path: Path) -> None:
    trainer = trainer_in(tmp_path / "logs", num_epochs=4, **FAST)
    trainer.config.project_kwargs = {"project_dir": str(tmp_path / "save"), "total_limit": 2}
    trainer.train()
    kept = sorted(path.name for path in (tmp_path / "save" / "checkpoints").iterdir())
    assert kept == ["checkpoint_2", "checkpoint_3"]
    with pytest.raises(ValueError, match="holds no checkpoint_N"):
        trainer_in(tmp_path / "logs", resume_from=str(tmp_path / "logs"))


def test_trls_wrapper_trains_its_adapter_which_plain_diffusers_loads(tmp_path: Path) -> None:
    base = saved_pipeline("sd15", tmp_path / "base")
    wrapper = DefaultDDPOStableDiffusionPipeline(str(base))
    trainer = trainer_in(tmp_path / "logs", wrapper)
    names = [name for name, weight in wrapper.sd_pipeline.unet.named_parameters() if weight.requires_grad]
    assert names
    assert all("lora" in name for name in names)
    assert {
        weight.shape[0] for name, weight in wrapper.sd_pipeline.unet.named_parameters() if "lora_A" in name
    } == {4}
    trainer.train(1)
    trainer.save_pretrained(tmp_path / "adapter")
    plain = load_pipeline(base)
    plain.load_lora_weights(tmp_path / "adapter")
    latents, timestep = torch.randn(1, 4, 8, 8), torch.tensor([500])
    embeds = plain.encode_prompt("a red cat", torch.device("cpu"), 1, False)[0]
    with torch.no_grad():
        ours = wrapper.sd_pipeline.unet(latents, timestep, embeds)[0]
        theirs = plain.unet(latents, timestep, embeds)[0]
        untrained = load_pipeline(base).unet(latents, timestep, embeds)[0]
    torch.testing.assert_close(ours, theirs)
    assert not torch.allclose(ours, untrained)


def test_a_wrapper_without_lora_trains_every_weight(tmp_path: Path) -> None:
    pipeline = tiny_pipeline("sd15")
    trainer = trainer_in(tmp_path, SimpleNamespace(sd_pipeline=pipeline, use_lora=False))
    assert len(weights_of(trainer)) == len(list(pipeline.unet.parameters()))


def test_a_critic_on_request(tmp_path: Path) -> None:
    trainer = trainer_in(tmp_path, critic=CriticConfig(trunk="shared"))
    assert trainer.engine.critic is not None
    output = trainer.engine.critic.head.output.weight
    assert not output.any()
    trainer.train(1)
    assert output.any()
    assert metrics_of(tmp_path)[0]["value_loss"] > 0


def test_a_critic_is_pretrained_on_what_the_prompt_function_draws(tmp_path: Path) -> None:
    trainer = trainer_in(tmp_path, critic=CriticConfig(trunk="shared"), **FAST)
    engine = trainer.engine
    assert len(set(engine.held_out.texts) - set(PROMPTS)) == 0
    few = replace(engine.config.pretrain, iterations=1, held_out_samples=8)
    engine.config = replace(engine.config, pretrain=few)
    result = engine.pretrain_critic()
    assert result.images == 8 + engine.config.batch_size
    trainer.train(1)
    assert len(metrics_of(tmp_path)) == 1


def test_rewards_may_run_in_threads(tmp_path: Path) -> None:
    together = threading.Barrier(2, timeout=60)

    def slow_redness(*batch: Any) -> tuple[Tensor, dict[str, int]]:
        # Breaks unless both batches are being judged at once.
        together.wait()
        return redness(*batch)

    threaded = trainer_in(tmp_path, reward=slow_redness, async_reward_computation=True, max_workers=2)
    plain = trainer_in(tmp_path)
    rollouts = [
        trainer.engine.collect(trainer.engine.prompts.draw(8, seed=0, iteration=0), 0)
        for trainer in (threaded, plain)
    ]
    first, second = (next(iter(rollout.rewards.values())) for rollout in rollouts if rollout is not None)
    torch.testing.assert_close(first, second, rtol=0, atol=1e-5)


def test_a_service_gets_the_numbers_and_the_hooks_pictures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Service:
        """Records what it is told."""

        def __init__(self, project: str, directory: Path, config: dict[str, Any]) -> None:
            self.opened = (project, directory, config["seed"])
            self.told: list[tuple[Any, ...]] = []
            services.append(self)

        def numbers(self, iteration: int, values: dict[str, float]) -> None:
            self.told.append((iteration, *values))

        def picture(self, iteration: int, name: str, image: Any) -> None:
            self.told.append((iteration, name, image.size))

    services: list[Service] = []
    monkeypatch.setattr("lacfast.compat.trl.WandbTracker", Service)
    trainer = trainer_in(
        tmp_path,
        image_samples_hook=lambda batches, step, log: log.log_images({"first": batches[0][0][:1]}, step),
        log_with="wandb",
        tracker_project_name="cats",
        **FAST,
    )
    trainer.train(1)
    (service,) = services
    assert service.opened == ("cats", tmp_path, 0)
    assert (0, "first", (16, 16)) in service.told
    assert any("train/policy_loss" in told for told in service.told)


def test_a_reward_of_another_interface_is_named(tmp_path: Path) -> None:
    def brightness(images: Tensor, prompts: tuple[str, ...], metadata: tuple[Any, ...]) -> Tensor:
        return images.mean(dim=(1, 2, 3))

    with pytest.raises(ValueError, match=r"brightness returned a Tensor"):
        trainer_in(tmp_path, reward=brightness).train(1)
