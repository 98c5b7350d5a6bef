"""TRL's DDPO trainer on lacfast's engine: same constructor, reward, prompt function and settings.

TRL dropped DDPOTrainer after 0.23. The loss is the same; its log-ratio is computed from the innovation, so it
does not suffer from how latents are stored. docs/migration.md lists what differs.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from torch import Tensor

from lacfast.backbones import PipelineSettings, load_backbone
from lacfast.checkpoint import TRAINER_STATE, save_backbone, whole_directory
from lacfast.compat.trl_config import DDPOConfig, train_config
from lacfast.compat.trl_functions import BatchedReward, PromptFunction, RewardFunction
from lacfast.config import CriticConfig, LoRAConfig
from lacfast.metrics import TensorBoardTracker, Tracker, WandbTracker
from lacfast.records import Rollout
from lacfast.runtime.files import write_json
from lacfast.trainer import LatentActorCriticTrainer

__all__ = ["DDPOConfig", "DDPOTrainer", "DefaultDDPOStableDiffusionPipeline"]

LORA = LoRAConfig(rank=4, alpha=4, target_modules=("to_k", "to_q", "to_v", "to_out.0"))
"""TRL's adapter."""
PROGRESS = "trl.json"


class DefaultDDPOStableDiffusionPipeline:
    """TRL's wrapper of a StableDiffusionPipeline: which one, and whether LoRA is trained."""

    def __init__(
        self, pretrained_model_name: str, *, pretrained_model_revision: str = "main", use_lora: bool = True
    ) -> None:
        """
        Args:
            pretrained_model_name: hub id or directory.
            pretrained_model_revision: of the hub's repository.
            use_lora: train an adapter of rank 4 on the attention's projections, else all weights.
        """
        load: Any = StableDiffusionPipeline.from_pretrained
        self.sd_pipeline: Any = load(pretrained_model_name, revision=pretrained_model_revision)
        self.use_lora = use_lora


class ImageLog:
    """What an image_samples_hook gets in place of accelerate's tracker: PNG files, and the run's service."""

    def __init__(self, directory: Path, trackers: Sequence[Tracker]) -> None:
        self.directory = directory
        self.trackers = trackers
        self.iteration = 0
        """The services' step: theirs counts epochs, the files' is the caller's."""

    def log_images(self, values: Mapping[str, Tensor], step: int | None = None) -> None:
        """Write every image of `values`, name -> (B, 3, H, W) in [0, 1], under the step."""
        target = self.directory / f"{step or 0:08d}"
        target.mkdir(parents=True, exist_ok=True)
        for position, (name, images) in enumerate(values.items()):
            label = re.sub(r"[^A-Za-z0-9.-]+", "_", name).strip("_")
            for row, image in enumerate(images):
                pixels = (image.detach().float().clamp(0, 1) * 255).round().byte().permute(1, 2, 0)
                picture = Image.fromarray(pixels.cpu().numpy())
                picture.save(target / f"{position:03d}-{row}-{label}.png")
                for tracker in self.trackers:
                    tracker.picture(self.iteration, name, picture)


class DDPOTrainer:
    """DDPO (arXiv 2305.13301) by TRL's interface; `engine` is the LatentActorCriticTrainer that runs it."""

    def __init__(
        self,
        config: DDPOConfig,
        reward_function: RewardFunction,
        prompt_function: Callable[[], tuple[str, Any]],
        sd_pipeline: Any,
        image_samples_hook: Callable[[list[list[Any]], int, ImageLog], Any] | None = None,
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
        settings = train_config(config, critic)
        self.config = config
        self.image_samples_hook = image_samples_hook
        self.global_step = 0
        self._steps_per_epoch = settings.ppo.num_minibatches * settings.ppo.num_inner_epochs
        self._reward = BatchedReward(config, reward_function)
        trackers = _trackers(config)
        self._images = ImageLog(config.project_directory / "samples", trackers)
        self.sd_pipeline = getattr(sd_pipeline, "sd_pipeline", sd_pipeline)
        if lora is None and getattr(sd_pipeline, "use_lora", False):
            lora = LORA
        if config.allow_tf32 and torch.cuda.is_available():
            torch.backends.cuda.matmul.allow_tf32 = True
        prompts = PromptFunction([], [], prompt_function)
        # Value pretraining judges the critic on prompts that stay the same.
        held_out = None if critic is None else prompts.cycle(settings.pretrain.held_out_samples)
        self.engine = LatentActorCriticTrainer(
            _backbone(self.sd_pipeline, config, lora),
            self._reward,
            prompts,
            settings,
            held_out=held_out,
            metrics_path=config.logging_directory / "metrics.jsonl",
            trackers=trackers,
        )
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

    def save_pretrained(self, save_directory: str | Path) -> None:
        """What plain diffusers loads: LoRA by `load_lora_weights`, all weights by `from_pretrained`."""
        save_backbone(self.engine.backbone, Path(save_directory))

    def _show(self, rollout: Rollout) -> None:
        batches = self._reward.take_batches()
        if self.image_samples_hook is not None:
            self._images.iteration = self.engine.iteration
            self.image_samples_hook(batches, self.global_step, self._images)

    @property
    def _checkpoints(self) -> Path:
        return self.config.project_directory / "checkpoints"

    def _save(self, epoch: int) -> None:
        with whole_directory(self._checkpoints / f"checkpoint_{epoch}") as target:
            self.engine.save(target)
            write_json(target / PROGRESS, {"global_step": self.global_step + self._steps_per_epoch})
        for path in _numbered(self._checkpoints)[: -self.config.kept_checkpoints]:
            shutil.rmtree(path)

    def _load(self, directory: Path) -> None:
        self.engine.load(directory)
        record = json.loads((directory / PROGRESS).read_text(encoding="utf-8"))
        self.global_step = record["global_step"]


def _trackers(config: DDPOConfig) -> list[Tracker]:
    if config.log_with == "tensorboard":
        return [TensorBoardTracker(config.logging_directory / "tensorboard")]
    if config.log_with == "wandb":
        return [WandbTracker(config.tracker_project_name, config.logging_directory, asdict(config))]
    return []


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
    found = [path for path in directory.glob("checkpoint_*") if (path / TRAINER_STATE).exists()]
    return sorted(found, key=lambda path: int(path.name.rpartition("_")[2]))


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
