"""TRL's DDPOConfig by its field names, and what each becomes here."""

from __future__ import annotations

import os
import sys
import warnings
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
from huggingface_hub import get_token

from lacfast.config import (
    DDPO,
    AdvantageConfig,
    BatchMean,
    CriticConfig,
    Fixed,
    PPOConfig,
    Ratio,
    SamplerConfig,
    TrainConfig,
)
from lacfast.config.checks import Bound, Config, Count, NonNegative, Positive, Range, Seed

_Beta = Annotated[float, Range(least=0, below=1)]
_PROJECT_KEYS = ("automatic_checkpoint_naming", "logging_dir", "project_dir", "total_limit")


# Not frozen: scripts set project_kwargs after parsing, as TRL's own example does.
@dataclass
class DDPOConfig(Config):
    """The fields and defaults of TRL 0.23, its last release with a DDPO trainer; see `train_config`."""

    exp_name: str = field(default_factory=lambda: os.path.basename(sys.argv[0]).removesuffix(".py"))
    """Name of the script; logged."""
    run_name: str = ""
    """Name of the run; logged."""
    seed: Seed = 0
    """TrainConfig.seed."""
    log_with: str | None = None
    """"tensorboard" or "wandb" besides metrics.jsonl, which is always written."""
    tracker_kwargs: dict[str, Any] = field(default_factory=dict)
    """Must be empty."""
    accelerator_kwargs: dict[str, Any] = field(default_factory=dict)
    """Must be empty: there is no accelerator."""
    project_kwargs: dict[str, Any] = field(default_factory=dict)
    """project_dir and logging_dir take logdir's place, total_limit num_checkpoint_limit's."""
    tracker_project_name: str = "trl"
    """Project of Weights & Biases."""
    logdir: str = "logs"
    """Where metrics.jsonl, checkpoints/ and samples/ go."""
    num_epochs: Count = 100
    """TrainConfig.iterations: an epoch is a rollout and its update."""
    save_freq: Count = 1
    """Epochs between checkpoints; epoch 0 is not saved."""
    num_checkpoint_limit: Count = 5
    """Checkpoints that are kept, the latest."""
    mixed_precision: str | None = "fp16"
    """None or "no", "bf16" or "fp16"; the last is run in bfloat16, where gradients do not underflow."""
    allow_tf32: bool = True
    """Whether matrix products may use TF32 on a GPU."""
    resume_from: str = ""
    """A checkpoint, or a directory whose latest checkpoint is taken."""
    sample_num_steps: Count = 50
    """SamplerConfig.num_steps."""
    sample_eta: Annotated[float, Range(above=0, most=1)] = 1.0
    """SamplerConfig.noise_level of the kind "ddim"."""
    sample_guidance_scale: Annotated[float, Range(least=1)] = 5.0
    """SamplerConfig.guidance_scale."""
    sample_batch_size: Count = 1
    """TrainConfig.rollout_batch_size: images sampled at a time and per call of the reward."""
    sample_num_batches_per_epoch: Count = 2
    """TrainConfig.batch_size is this times sample_batch_size."""
    train_batch_size: Count = 1
    """PPOConfig.microbatch_size: (sample, step) pairs per forward and backward."""
    train_use_8bit_adam: bool = False
    """Must be False."""
    train_learning_rate: NonNegative = 3e-4
    """PPOConfig.policy_learning_rate."""
    train_adam_beta1: _Beta = 0.9
    """PPOConfig.betas."""
    train_adam_beta2: _Beta = 0.999
    """PPOConfig.betas."""
    train_adam_weight_decay: NonNegative = 1e-4
    """PPOConfig.weight_decay."""
    train_adam_epsilon: Positive = 1e-8
    """PPOConfig.adam_eps; 1e-15 does not damp the gradients of a mean-reduced log-prob."""
    train_gradient_accumulation_steps: Count = 1
    """An optimizer step takes this times train_batch_size samples' worth of pairs; sets num_minibatches."""
    train_max_grad_norm: Bound = 1.0
    """PPOConfig.max_grad_norm."""
    train_num_inner_epochs: Count = 1
    """PPOConfig.num_inner_epochs."""
    train_cfg: bool = True
    """PPOConfig.cfg_grad="both". False is only consistent without guidance."""
    train_adv_clip_max: Bound = 5.0
    """PPOConfig.advantage_clip."""
    train_clip_range: Positive = 1e-4
    """PPOConfig.clip, as a Ratio."""
    train_timestep_fraction: Annotated[float, Range(above=0, most=1)] = 1.0
    """PPOConfig.timestep_fraction."""
    per_prompt_stat_tracking: bool = False
    """Advantages relative to the prompt's own rewards (ddpo.PerPromptStatTracker), not to the batch."""
    per_prompt_stat_tracking_buffer_size: Count = 16
    """Rewards kept per prompt."""
    per_prompt_stat_tracking_min_count: Count = 16
    """Rewards from which on a prompt has a baseline of its own."""
    async_reward_computation: bool = False
    """Judge max_workers batches at once, in threads; they are sampled together. Without it a reward runs
    beside the sampling of the next batch all the same."""
    max_workers: Count = 2
    """Threads of async_reward_computation."""
    negative_prompts: str = ""
    """One negative prompt, PipelineSettings.negative_prompt; TRL never split it at commas."""
    push_to_hub: bool = False
    """Whether the script uploads, by `trainer.push_to_hub`; True needs a login."""

    def to_dict(self) -> dict[str, Any]:
        """Field name -> value; the entries of a dict as "name/key"."""
        fields = asdict(self)
        nested = {key: value for key, value in fields.items() if isinstance(value, dict)}
        inner = {f"{name}/{key}": value for name, entries in nested.items() for key, value in entries.items()}
        return {key: value for key, value in fields.items() if key not in nested} | inner

    @property
    def samples_per_epoch(self) -> int:
        return self.sample_batch_size * self.sample_num_batches_per_epoch

    @property
    def reward_threads(self) -> int:
        return self.max_workers if self.async_reward_computation else 1

    @property
    def project_directory(self) -> Path:
        """Directory of the checkpoints and samples."""
        return Path(self.project_kwargs.get("project_dir", self.logdir))

    @property
    def logging_directory(self) -> Path:
        """Directory of metrics.jsonl."""
        return Path(self.project_kwargs.get("logging_dir", self.logdir))

    @property
    def kept_checkpoints(self) -> int:
        return int(self.project_kwargs.get("total_limit") or self.num_checkpoint_limit)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype that the model runs in."""
        return torch.float32 if self.mixed_precision in (None, "no") else torch.bfloat16


def train_config(config: DDPOConfig, critic: CriticConfig | None = None) -> TrainConfig:
    """Our settings for TRL's. Every step is trained, with its own noise, as TRL does.

    Args:
        config: of TRL's names.
        critic: train with this value function. None: DDPO, without one.

    Raises:
        ValueError: batch sizes that do not divide each other, or a setting that would be ignored.
    """
    _refuse_ignored(config, critic)
    minibatch = config.train_batch_size * config.train_gradient_accumulation_steps
    for whole, part, names in (
        (config.sample_batch_size, config.train_batch_size, "sample_batch_size, train_batch_size"),
        (config.samples_per_epoch, minibatch, "samples per epoch, samples per optimizer step"),
    ):
        if whole % part:
            raise ValueError(f"{names}: {whole} must be a multiple of {part}")
    if config.mixed_precision == "fp16":
        warnings.warn(
            "mixed_precision='fp16' runs in bfloat16: gradients of a mean-reduced log-prob underflow in "
            "float16. Set 'bf16' or 'no' to silence this",
            stacklevel=3,
        )
    return TrainConfig(
        seed=config.seed,
        batch_size=config.samples_per_epoch,
        rollout_batch_size=config.sample_batch_size * config.reward_threads,
        iterations=config.num_epochs,
        sampler=SamplerConfig(
            kind="ddim",
            num_steps=config.sample_num_steps,
            noise_level=config.sample_eta,
            window=Fixed((0, config.sample_num_steps)),
            guidance_scale=config.sample_guidance_scale,
        ),
        advantages=_advantages(config) if critic is None else AdvantageConfig(),
        critic=CriticConfig(trunk="none") if critic is None else critic,
        ppo=PPOConfig(
            clip=Ratio(config.train_clip_range),
            advantage_clip=config.train_adv_clip_max,
            num_minibatches=config.samples_per_epoch // minibatch,
            num_inner_epochs=config.train_num_inner_epochs,
            timestep_fraction=config.train_timestep_fraction,
            microbatch_size=config.train_batch_size,
            policy_learning_rate=config.train_learning_rate,
            betas=(config.train_adam_beta1, config.train_adam_beta2),
            weight_decay=config.train_adam_weight_decay,
            adam_eps=config.train_adam_epsilon,
            max_grad_norm=config.train_max_grad_norm,
            cfg_grad="both" if config.sample_guidance_scale > 1 else "cond",
        ),
    )


def _advantages(config: DDPOConfig) -> AdvantageConfig:
    """DDPO's baseline: the prompt's own rewards, or the epoch's."""
    if not config.per_prompt_stat_tracking:
        return AdvantageConfig(estimator=BatchMean())
    return AdvantageConfig(
        estimator=DDPO(
            buffer_size=config.per_prompt_stat_tracking_buffer_size,
            min_count=config.per_prompt_stat_tracking_min_count,
        )
    )


def _refuse_ignored(config: DDPOConfig, critic: CriticConfig | None) -> None:
    unknown = sorted(set(config.project_kwargs) - set(_PROJECT_KEYS))
    refused = {
        "tracker_kwargs": bool(config.tracker_kwargs),
        "accelerator_kwargs": bool(config.accelerator_kwargs),
        f"project_kwargs {unknown}; known: {', '.join(_PROJECT_KEYS)}": bool(unknown),
        "train_use_8bit_adam; AdamW runs in float32": config.train_use_8bit_adam,
        "train_cfg=False, since the rollout is guided and ratios would not start at 1; keep it True "
        "or set sample_guidance_scale=1": not config.train_cfg and config.sample_guidance_scale > 1,
        "per_prompt_stat_tracking beside a critic, which is the baseline": config.per_prompt_stat_tracking
        and critic is not None,
    }
    for what, is_set in refused.items():
        if is_set:
            raise ValueError(f"this setting would be ignored: {what}")
    if config.log_with not in (None, "tensorboard", "wandb"):
        raise ValueError(f"unknown log_with {config.log_with!r}; known: None, 'tensorboard', 'wandb'")
    if config.mixed_precision not in (None, "no", "bf16", "fp16"):
        raise ValueError(f"unknown mixed_precision {config.mixed_precision!r}; known: 'no', 'bf16', 'fp16'")
    if config.push_to_hub and get_token() is None:
        raise ValueError("push_to_hub=True without a login to the hub; run `hf auth login` or set HF_TOKEN")
