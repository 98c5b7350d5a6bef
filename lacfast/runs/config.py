"""What the commands are told: model, prompts, rewards, and where everything goes."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from lacfast.config import (
    LoRAConfig,
    PipelineSettings,
    SamplerConfig,
    SteeringConfig,
    TrainConfig,
    resumption,
)
from lacfast.config.checks import Config, Count, CountOrNone, Finite, OneOf, Seed, check_fields
from lacfast.config.critic import BASE_PRECISIONS
from lacfast.config.unread import Unread
from lacfast.rewards.names import require_servers

Dtype = Literal["float32", "bfloat16", "float16"]

EVALUATION_SAMPLER = SamplerConfig(kind="ode", num_steps=40, noise_level=0.0)
"""How a model is judged of which no run tells how."""
EMBEDDED_MODELS = tuple(
    f"{task}-{name}" for task in ("shapes", "glyphs", "words", "crowds") for name in ("dit", "unet")
)
"""Models that are pretrained on the spot; lacfast.runs.embedded.TINY_MODELS says what of."""


@dataclass(frozen=True, kw_only=True)
class RunConfig(Config):
    """One run of `lacfast train`; a recipe gives the defaults."""

    UNREAD = (
        Unread(
            options=(
                *("dtype", "base_precision", "pipeline", "attention_backend", "lora_from", "merged_loras"),
            ),
            where=lambda run: run.model in EMBEDDED_MODELS,
            because=lambda run: (
                f": model={run.model!r} is made on the spot, in float32 at the size of its pictures"
            ),
        ),
        Unread(
            options=("lora", "lora_from", "base_precision"),
            where=lambda run: run.full_finetuning,
            because=lambda run: ": full_finetuning=True trains all weights",
        ),
        Unread(
            options=("base_precision",),
            where=lambda run: run.lora is None and run.lora_from == "",
            because=lambda run: " without a LoRA: all weights are trained, in float32",
        ),
        Unread(
            options=("lora",),
            where=lambda run: run.lora_from != "",
            because=lambda run: (
                f": that of lora_from={run.lora_from!r} has rank, alpha and modules of its own"
            ),
        ),
        Unread(
            options=("pipeline.negative_prompt",),
            where=lambda run: not run.is_guided,
            because=lambda run: ": no sampler of the run has a guidance_scale above 1",
        ),
        Unread(
            options=("critic_from",),
            where=lambda run: run.train.critic.trunk == "none",
            because=lambda run: ": train.critic.trunk='none' has no critic",
        ),
        Unread(
            options=("gpus",),
            where=lambda run: not run.dry_run,
            because=lambda run: ": a run has as many as it is started with",
            remedy="start it with torchrun --nproc-per-node, or add --dry-run",
        ),
        Unread(
            options=("train.pretrain",),
            where=lambda run: not run.value_pretraining,
            because=lambda run: ": value_pretraining=False does without",
        ),
        Unread(
            options=(
                *("best", "evaluation_rewards", "train.early_stopping.score"),
                *("train.eval_samples", "train.eval_batch_size"),
            ),
            where=lambda run: run.train.eval_every == 0,
            because=lambda run: ": train.eval_every=0 evaluates nothing",
        ),
        Unread(
            options=("held_out",),
            where=lambda run: not run.is_measured,
            because=lambda run: ": neither an evaluation nor value pretraining asks for prompts",
        ),
    )

    out: str
    """Directory of the run: settings, metrics.jsonl, samples/, checkpoints/."""
    model: str
    """Directory or hub id of a diffusers pipeline; "shapes-dit", "glyphs-dit", "words-dit", "crowds-dit" and
    the same with "-unet" are made on the spot."""
    prompts: str
    """A .txt, .jsonl or .parquet file, a `datasets` directory, "hub:OWNER/NAME,split=train", any of them with
    ",column=NAME"; or "animals", "shapes", "glyphs", "words", "crowds"."""
    held_out: str = ""
    """Prompts of evaluation, like `prompts`; "shapes-held-out". Empty: the training prompts."""
    rewards: tuple[tuple[str, Finite], ...]
    """(reward, weight) pairs; a registered name, "package.module:callable", or a server: URL or name=URL."""
    evaluation_rewards: tuple[str, ...] = ()
    """Rewards that are only reported."""
    device: str = ""
    """Where the model lives. Empty: a GPU if there is one."""
    dtype: Dtype = "float32"
    """Dtype that the model runs in; trained weights are float32 all the same."""
    base_precision: Annotated[str, OneOf(BASE_PRECISIONS)] = "model"
    """What a LoRA's frozen base is kept in: "int8" is a byte per weight of its blocks, a scale per row."""
    lora: LoRAConfig | None = None
    """Train this adapter. None: all weights."""
    lora_from: str = ""
    """A trained LoRA to train on: a directory, file or hub id in diffusers' or peft's layout, or one file of
    a repository, owner/name/FILE. Empty: a new one, or that of a saved model. `train.ppo.kl` says whether
    its anchor is this LoRA's policy or its base."""
    merged_loras: tuple[tuple[str, Finite], ...] = ()
    """(LoRA, weight) pairs that are added to the model's weights before anything is trained."""
    full_finetuning: bool = False
    """Train all weights where a recipe has a `lora`."""
    pipeline: PipelineSettings = field(default_factory=PipelineSettings)
    attention_backend: str = ""
    """"sdpa", "xformers" or a name of diffusers' dispatcher. Empty: the model's own."""
    keep_text_encoders: bool = True
    """False takes them off the device but while they encode a block of the prompts that are drawn next; the
    embeddings are kept in files for all runs, in Hugging Face's cache (HF_ASSETS_CACHE, or HF_HOME)."""
    value_pretraining: bool = True
    """Fit the critic before the first policy update, where there is one."""
    critic_from: str = ""
    """A trained critic to begin with, by the same `train.critic` and rewards: critic.safetensors, or a
    checkpoint. Empty: a new one, or that of a saved model."""
    save_every: CountOrNone = 10
    """Iterations between checkpoints, of value pretraining too; 0: only at the end."""
    keep_last: Count = 2
    """Checkpoints that are kept besides the best one."""
    best: str = ""
    """Score of evaluations whose best checkpoint is kept. Empty: early stopping's, or the first reward."""
    resume: str = "auto"
    """"auto" goes on from the last checkpoint in `out`, "never" wants an empty `out`, else a checkpoint."""
    tensorboard: bool = False
    """Write event files to out/tensorboard."""
    wandb_project: str = ""
    """Log to this project of Weights & Biases. Empty: do not."""
    dry_run: bool = False
    """Print the resolved settings, the memory and the cost of an iteration, and stop. Reads no weights."""
    gpus: Count = 1
    """GPUs that `dry_run` plans for, 1: train.shard of them; torchrun says how many a run has."""
    train: TrainConfig = field(default_factory=TrainConfig)

    @property
    def planned_gpus(self) -> int:
        """GPUs that `dry_run` plans for: at least as many as share the weights, where none are named."""
        return self.train.shard if self.gpus == 1 else self.gpus

    @property
    def is_measured(self) -> bool:
        """Whether held-out prompts are ever drawn."""
        train = self.train
        pretrains = self.value_pretraining and train.critic.trunk != "none"
        return train.eval_every > 0 or (pretrains and train.pretrain.held_out_samples > 0)

    @property
    def is_guided(self) -> bool:
        """Whether the unconditional half ever runs."""
        samplers = (self.train.sampler, self.train.eval_sampler)
        return any(sampler is not None and sampler.guidance_scale > 1 for sampler in samplers)

    def __post_init__(self) -> None:
        check_fields(self)
        # Before the settings are shown or written anywhere.
        require_servers([*(name for name, _ in self.rewards), *self.evaluation_rewards])
        super().__post_init__()
        train = self.train
        if self.base_precision == "int8" and (train.rollout_precision != "model" or train.shard > 1):
            raise ValueError(
                f"base_precision='int8' is one base for sampling and training, on every GPU; "
                f"train.rollout_precision={train.rollout_precision!r} and train.shard={train.shard} want "
                "others: use 'model' and 1, or base_precision='model'"
            )
        for name in ("out", "model", "prompts", "rewards"):
            if not getattr(self, name):
                raise ValueError(f"{name} is empty; every run needs it")


CHANGEABLE = {
    *("out", "prompts", "held_out", "rewards", "evaluation_rewards", "device", "attention_backend"),
    *("keep_text_encoders", "save_every", "keep_last", "best", "resume", "tensorboard", "wandb_project"),
    *("dry_run", *(f"train.{name}" for name in resumption.CHANGEABLE)),
}
"""Settings that may change when a run goes on; the trainer itself compares the rewards."""


@dataclass(frozen=True, kw_only=True)
class EvaluationRun(Config):
    """One run of `lacfast evaluate`."""

    source: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="SOURCE")]
    """A run of `lacfast train` or of the demo, a checkpoint, or a pipeline's directory or hub id."""
    prompts: str
    """Prompts, as `lacfast train` takes them."""
    rewards: tuple[str, ...]
    """Names of rewards, "package.module:callable" or URLs."""
    sampler: SamplerConfig = EVALUATION_SAMPLER
    """Left as it is, that of the run's own evaluations; any flag of it replaces that as a whole."""
    samples: Count = 1024
    """Images; the prompts are repeated as often as it takes."""
    batch_size: Count = 16
    """Images at a time."""
    seed: Seed = 0
    """Seed of the noise."""
    device: str = ""
    """Empty: a GPU if there is one."""
    dtype: Dtype = "float32"
    """Dtype that the model runs in."""
    out: Path | None = None
    """Write scores.json and samples.png here. None: only print."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_servers(self.rewards)


@dataclass(frozen=True, kw_only=True)
class SteeringRun(Config):
    """One run of `lacfast steer`."""

    source: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="SOURCE")]
    """A run of `lacfast train` or of the demo, a checkpoint, or a pipeline's directory or hub id."""
    prompts: tuple[str, ...]
    """Prompts themselves, or one source of them as `lacfast train` takes it."""
    out: Path
    """Directory for images/, samples.png and statistics.json."""
    critic: str = ""
    """critic.safetensors, or a directory that holds one, for a plain pipeline. Empty: the model's own."""
    rewards: tuple[str, ...] = ()
    """The critic's rewards, to report and for --selection reward."""
    gold: tuple[str, ...] = ()
    """Rewards that are only reported."""
    head_weights: tuple[Finite, ...] = ()
    """Weight of each head of the critic. Empty: those of its training."""
    samples: CountOrNone = 0
    """Images; the prompts are repeated as often as it takes. 0: one per prompt."""
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    """Left as it is, the run's own; any flag of it replaces that as a whole."""
    settings: Annotated[SteeringConfig, tyro.conf.arg(name="")] = field(default_factory=SteeringConfig)
    device: str = ""
    """Empty: a GPU if there is one."""
    dtype: Dtype = "float32"
    """Dtype that the model runs in."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_servers([*self.rewards, *self.gold])
