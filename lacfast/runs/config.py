"""Settings of a training run from the command line: model, prompts, rewards, and where everything goes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from lacfast.config import LoRAConfig, TrainConfig


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One run of `lacfast train`; a preset gives the defaults."""

    out: str
    """Directory of the run: settings, metrics.jsonl, samples/, checkpoints/."""
    model: str
    """Directory or hub id of a diffusers pipeline; "shapes-dit", "shapes-unet", "glyphs-dit"
    and "glyphs-unet" are made on the spot."""
    prompts: str
    """A .txt, .jsonl or .parquet file, a `datasets` directory, or "animals", "shapes"."""
    held_out: str = ""
    """Prompts of evaluation, like `prompts`; "shapes-held-out". Empty: the training prompts."""
    rewards: tuple[tuple[str, float], ...]
    """(reward, weight) pairs; a registered name, "package.module:callable" or the URL of a server."""
    evaluation_rewards: tuple[str, ...] = ()
    """Rewards that are only reported."""
    device: str = ""
    """Where the model lives. Empty: a GPU if there is one."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """That the model runs in; trained weights are float32 all the same."""
    lora: LoRAConfig | None = None
    """Train this adapter. None: all weights."""
    full_finetuning: bool = False
    """Train all weights although there is a `lora`."""
    resolution: tuple[int, int] | None = None
    """(height, width) in pixels. None: the pipeline's own."""
    attention_backend: str = ""
    """"sdpa", "xformers" or a name of diffusers' dispatcher. Empty: the model's own."""
    keep_text_encoders: bool = True
    """False encodes all prompts at the start and frees the encoders' memory."""
    value_pretraining: bool = True
    """Fit the critic before the first policy update, where there is one."""
    save_every: int = 10
    """Iterations between checkpoints; 0: only at the end."""
    keep_last: int = 2
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
    train: TrainConfig = field(default_factory=TrainConfig)

    @property
    def adapter(self) -> LoRAConfig | None:
        """The LoRA that is trained, None for all weights."""
        return None if self.full_finetuning else self.lora

    def __post_init__(self) -> None:
        for name in ("out", "model", "prompts", "rewards"):
            if not getattr(self, name):
                raise ValueError(f"{name} is empty; every run needs it")
        if self.save_every < 0:
            raise ValueError(f"save_every={self.save_every} must be >= 0 (0: only at the end)")
        if self.keep_last < 1:
            raise ValueError(f"keep_last={self.keep_last} must be at least 1, or no run could be resumed")
