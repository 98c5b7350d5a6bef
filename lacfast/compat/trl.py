"""TRL's DDPO trainer on lacfast's engine: same constructor, reward, prompt function and settings.

TRL dropped DDPOTrainer after 0.23. The loss is the same; its log-ratio is computed from the innovation, so it
does not suffer from how latents are stored. docs/migration.md lists what differs.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from lacfast.backbones import PipelineSettings, load_backbone, publishing
from lacfast.checkpoint import TRAINER_STATE, save_backbone
from lacfast.compat.ddpo import ddim_step_with_logprob, pipeline_with_logprob
from lacfast.compat.trl_config import DDPOConfig, train_config
from lacfast.compat.trl_functions import BatchedReward, PromptFunction, RewardFunction
from lacfast.compat.trl_pipeline import (
    LORA,
    DefaultDDPOStableDiffusionPipeline,
    continue_adapter,
    require_default_behaviour,
    take_adapter,
)
from lacfast.compat.trl_tracking import HookLog, SingleProcess
from lacfast.config import CriticConfig, LoRAConfig
from lacfast.metrics import TensorBoardTracker, Tracker, WandbTracker
from lacfast.records import Rollout
from lacfast.runtime.directories import remove
from lacfast.trainer import LatentActorCriticTrainer

__all__ = ["DDPOConfig", "DDPOTrainer", "DefaultDDPOStableDiffusionPipeline"]

PROGRESS = "trl.json"
NOT_CALLED = (
    "loss",
    "calculate_loss",
    "_generate_samples",
    "_train_batched_samples",
    "_setup_optimizer",
    "_config_check",
    "_save_model_hook",
    "_load_model_hook",
    "_save_pretrained",
    "create_model_card",
)
"""TRL's methods that the engine does itself."""


class DDPOTrainer:
    """DDPO (arXiv 2305.13301) by TRL's interface; `engine` is the LatentActorCriticTrainer that runs it."""

    def __init__(
        self,
        config: DDPOConfig,
        reward_function: RewardFunction,
        prompt_function: Callable[[], tuple[str, Any]],
        sd_pipeline: Any,
        image_samples_hook: Callable[[list[list[Any]], int, HookLog], Any] | None = None,
        *,
        critic: CriticConfig | None = None,
        lora: LoRAConfig | None = None,
    ) -> None:
        """
        Args:
            config: TRL's settings.
            reward_function: called with sample_batch_size images at a time.
            prompt_function: one prompt and its metadata per call. Python's, numpy's and torch's generators
                are seeded by (seed, epoch) around it, so that a resumed run draws what the first would have.
            sd_pipeline: TRL's wrapper, ours, or a diffusers pipeline of a UNet that load_backbone knows.
            image_samples_hook: called before each update with [images, prompts, metadata, rewards,
                reward metadata] of every sample batch, the global step and a log for pictures.
            critic: train with this value function as the baseline. None: DDPO.
            lora: train this adapter. None: TRL's own if the wrapper has use_lora, else all weights.

        Raises:
            ValueError: settings that cannot train or would be ignored.
        """
        _require_called_overrides(type(self))
        settings = train_config(config, critic)
        self.config = config
        self.prompt_fn = prompt_function
        self.reward_fn = reward_function
        self.image_samples_callback = image_samples_hook
        self.num_train_timesteps = int(config.sample_num_steps * config.train_timestep_fraction)
        self.global_step = 0
        self._steps_per_epoch = settings.ppo.num_minibatches * settings.ppo.num_inner_epochs
        self._reward = BatchedReward(config, reward_function, self.compute_rewards)
        self.sd_pipeline = sd_pipeline
        pipeline = getattr(sd_pipeline, "sd_pipeline", sd_pipeline)
        if config.allow_tf32 and torch.cuda.is_available():
            torch.backends.cuda.matmul.allow_tf32 = True
        prompts = PromptFunction([], [], prompt_function)
        # Value pretraining judges the critic on prompts that stay the same.
        held_out = None if critic is None else prompts.cycle(settings.pretrain.held_out_samples)
        self.engine = LatentActorCriticTrainer(
            _wrapped(sd_pipeline, config, lora)
            if pipeline is not sd_pipeline
            else _backbone(pipeline, config, lora),
            self._reward,
            prompts,
            settings,
            held_out=held_out,
            metrics_path=config.logging_directory / "metrics.jsonl",
            trackers=_trackers(config),
        )
        log = HookLog(config.project_directory / "samples", self.engine.log)
        self.accelerator = SingleProcess(self.engine.device, config.mixed_precision or "no", log)
        if config.resume_from:
            self._load(_latest(Path(config.resume_from).expanduser()))
        self.first_epoch = self.engine.iteration
        self.engine.log.write("trl_config", self.engine.iteration, **asdict(config))

    def train(self, epochs: int | None = None) -> None:
        """Train up to epoch `epochs`, counted from the run's beginning; None: config.num_epochs."""
        for epoch in range(self.first_epoch, self.config.num_epochs if epochs is None else epochs):
            self.global_step = self.step(epoch, self.global_step)

    def step(self, epoch: int, global_step: int) -> int:
        """One rollout and its update, and a checkpoint when it is due; returns the optimizer steps so far."""
        self.global_step = global_step
        # What evaluations and value pretraining judged is none of the hook's.
        self._reward.take_batches()
        self.engine.train_iteration(on_rollout=self._show)
        if epoch != 0 and epoch % self.config.save_freq == 0:
            self._save(epoch)
        return global_step + self._steps_per_epoch

    def compute_rewards(
        self, prompt_image_pairs: list[list[Any]], is_async: bool = False
    ) -> tuple[tuple[Tensor, ...], tuple[Any, ...]]:
        """Rewards and reward metadata of [images, prompts, metadata] batches, in threads where `is_async`."""
        return self._reward.judge(prompt_image_pairs, self.config.max_workers if is_async else 1)

    def save_pretrained(
        self,
        save_directory: str | Path,
        *,
        repo_id: str | None = None,
        push_to_hub: bool = False,
        **push_settings: Any,
    ) -> None:
        """What plain diffusers loads: LoRA by `load_lora_weights`, all weights by `from_pretrained`.

        With `push_to_hub` it is uploaded too, as `repo_id` or the directory's name.
        """
        directory = Path(save_directory)
        if push_settings and not push_to_hub:
            raise ValueError(f"{sorted(push_settings)} would be ignored; set push_to_hub=True")
        save_backbone(self.engine.backbone, directory)
        if push_to_hub:
            publishing.push_to_hub(directory, repo_id or directory.name, **{"private": None} | push_settings)

    def push_to_hub(self, repo_id: str, **settings: Any) -> str:
        """Upload what `save_pretrained` writes; `settings` are push_to_hub's. Returns the commit's URL."""
        with TemporaryDirectory() as directory:
            self.save_pretrained(Path(directory) / "model")
            return publishing.push_to_hub(Path(directory) / "model", repo_id, **{"private": None} | settings)

    @torch.no_grad()
    def _generate_samples(
        self, iterations: int, batch_size: int
    ) -> tuple[list[dict[str, Tensor]], list[list[Any]]]:
        """Trajectories of today's weights and [images, prompts, metadata], by TRL's names and shapes.

        For scripts that look at them: the engine samples its own.
        """
        pipeline, config = self._pipeline, self.config
        negative = self._embeds([config.negative_prompts or ""])[1].repeat(batch_size, 1, 1)
        samples, pairs = [], []
        for _ in range(iterations):
            prompts, metadata = zip(*[self.prompt_fn() for _ in range(batch_size)], strict=True)
            prompt_ids, embeds = self._embeds(list(prompts))
            with self._precision():
                images, _, all_latents, all_log_probs = pipeline_with_logprob(
                    pipeline,
                    prompt_embeds=embeds,
                    negative_prompt_embeds=negative,
                    num_inference_steps=config.sample_num_steps,
                    guidance_scale=config.sample_guidance_scale,
                    eta=config.sample_eta,
                    output_type="pt",
                )
            latents = torch.stack(all_latents, dim=1)
            samples.append(
                {
                    "prompt_ids": prompt_ids,
                    "prompt_embeds": embeds,
                    "timesteps": pipeline.scheduler.timesteps.repeat(batch_size, 1),
                    "latents": latents[:, :-1],
                    "next_latents": latents[:, 1:],
                    "log_probs": torch.stack(all_log_probs, dim=1),
                    "negative_prompt_embeds": negative,
                }
            )
            pairs.append([images, prompts, metadata])
        return samples, pairs

    def calculate_loss(
        self,
        latents: Tensor,
        timesteps: Tensor,
        next_latents: Tensor,
        log_probs: Tensor,
        advantages: Tensor,
        embeds: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """TRL's loss of transitions (B, C, H, W), its estimate of the KL and the share of clipped ratios.

        For scripts that look at them: the engine computes its own. `embeds` are (2 B, L, D), the negative
        prompts' first, without `train_cfg` (B, L, D).
        """
        with self._precision():
            if self.config.train_cfg:
                latent_input, timestep_input = torch.cat([latents] * 2), torch.cat([timesteps] * 2)
                unguided, guided = self._pipeline.unet(latent_input, timestep_input, embeds).sample.chunk(2)
                output = unguided + self.config.sample_guidance_scale * (guided - unguided)
            else:
                output = self._pipeline.unet(latents, timesteps, embeds).sample
            log_prob = ddim_step_with_logprob(
                self._pipeline.scheduler,
                output,
                timesteps,
                latents,
                eta=self.config.sample_eta,
                prev_sample=next_latents,
            )[1]
        limit, clip_range = self.config.train_adv_clip_max, self.config.train_clip_range
        ratio = (log_prob - log_probs).exp()
        loss = self.loss(advantages.clamp(-limit, limit), clip_range, ratio)
        clipped = ((ratio - 1).abs() > clip_range).float().mean()
        return loss, 0.5 * (log_prob - log_probs).square().mean(), clipped

    def loss(self, advantages: Tensor, clip_range: float, ratio: Tensor) -> Tensor:
        """mean( max(-A r, -A clip(r, 1 - c, 1 + c)) )    (PPO, arXiv 1707.06347, eq. 7)"""
        unclipped = -advantages * ratio
        clipped = -advantages * ratio.clamp(1 - clip_range, 1 + clip_range)
        return torch.maximum(unclipped, clipped).mean()

    @property
    def _pipeline(self) -> Any:
        return getattr(self.sd_pipeline, "sd_pipeline", self.sd_pipeline)

    def _precision(self) -> AbstractContextManager[Any]:
        dtype = self.config.dtype
        return torch.autocast(self.engine.device.type, dtype, enabled=dtype != torch.float32)

    def _embeds(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """Token ids (B, L) and embeddings (B, L, D)."""
        tokenizer = self._pipeline.tokenizer
        ids = tokenizer(
            prompts,
            return_tensors="pt",
            padding="max_length",
            truncation=True,
            max_length=tokenizer.model_max_length,
        ).input_ids.to(self.engine.device)
        return ids, self._pipeline.text_encoder(ids)[0]

    def _show(self, rollout: Rollout) -> None:
        batches = self._reward.take_batches()
        if self.image_samples_callback is not None:
            (log,) = self.accelerator.trackers
            log.iteration = self.engine.iteration
            self.image_samples_callback(batches, self.global_step, log)

    @property
    def _checkpoints(self) -> Path:
        return self.config.project_directory / "checkpoints"

    def _save(self, epoch: int) -> None:
        progress = {"global_step": self.global_step + self._steps_per_epoch}
        self.engine.save(self._checkpoints / f"checkpoint_{epoch}", notes={PROGRESS: progress})
        for path in _numbered(self._checkpoints)[: -self.config.kept_checkpoints]:
            remove(path)

    def _load(self, directory: Path) -> None:
        self.engine.load(directory)
        record = json.loads((directory / PROGRESS).read_text(encoding="utf-8"))
        self.global_step = record["global_step"]


def _require_called_overrides(trainer: type) -> None:
    """
    Raises:
        ValueError: for a subclass with methods of its own that nothing would call.
    """
    own = {name for kind in trainer.__mro__[: trainer.__mro__.index(DDPOTrainer)] for name in vars(kind)}
    ignored = [name for name in NOT_CALLED if name in own]
    if ignored:
        raise ValueError(
            f"{trainer.__name__} has its own {', '.join(ignored)}, which would not be called: "
            "the engine samples and learns; override compute_rewards, step or train"
        )


def _trackers(config: DDPOConfig) -> list[Tracker]:
    if config.log_with == "tensorboard":
        return [TensorBoardTracker(config.logging_directory / "tensorboard")]
    if config.log_with == "wandb":
        return [WandbTracker(config.tracker_project_name, config.logging_directory, asdict(config))]
    return []


def _wrapped(wrapper: Any, config: DDPOConfig, lora: LoRAConfig | None) -> Any:
    """The backbone of a wrapper's pipeline; a LoRA from the model's folder goes on."""
    require_default_behaviour(wrapper)
    loaded = take_adapter(wrapper.sd_pipeline)
    if loaded is None:
        return _backbone(
            wrapper.sd_pipeline, config, lora or (LORA if getattr(wrapper, "use_lora", False) else None)
        )
    if lora is not None:
        raise ValueError(f"{lora} would be ignored: a LoRA in the model's folder goes on; leave lora out")
    backbone = _backbone(wrapper.sd_pipeline, config, loaded[0])
    continue_adapter(backbone, loaded[1])
    return backbone


def _backbone(pipeline: Any, config: DDPOConfig, lora: LoRAConfig | None) -> Any:
    """The pipeline's backbone, on a GPU if there is one, its frozen parts in the run's dtype."""
    for name in ("vae", "text_encoder"):
        part = getattr(pipeline, name, None)
        if part is not None and part.dtype != config.dtype:
            part.to(dtype=config.dtype)
    return load_backbone(
        pipeline,
        device="cuda" if torch.cuda.is_available() else None,
        dtype=config.dtype,
        lora=lora,
        settings=PipelineSettings(
            negative_prompt=config.negative_prompts or None,
        ),
    )


def _numbered(directory: Path) -> list[Path]:
    """Complete checkpoints in a directory, oldest first."""
    found = {
        path: re.fullmatch(r"checkpoint_(0|[1-9]\d*)", path.name) for path in directory.glob("checkpoint_*")
    }
    epochs = {path: int(name[1]) for path, name in found.items() if name and (path / TRAINER_STATE).exists()}
    return sorted(epochs, key=epochs.__getitem__)


def _latest(path: Path) -> Path:
    """
    Raises:
        ValueError: when there is no checkpoint.
    """
    if (path / TRAINER_STATE).exists():
        return path
    found = _numbered(path) or _numbered(path / "checkpoints")
    if not found:
        raise ValueError(f"resume_from={str(path)!r} holds no checkpoint_N directory")
    return found[-1]
