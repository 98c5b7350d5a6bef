"""The command line's help, a screen at a time: what most people set, and every other setting by topic."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from lacfast.config.checks import Config, field_types, unknown
from lacfast.runs.config import RunConfig, SteeringRun

_CODE = re.compile(r"\x1b\[[0-9;]*m")
_BOX = "╭│╰"


@dataclass(frozen=True)
class Topic:
    """Settings that are read together."""

    line: str
    """What they are."""
    settings: tuple[str, ...]
    """Dotted names; of a part with settings of its own all of them."""


@dataclass(frozen=True)
class Pages:
    """The help of one command."""

    root: type[Config]
    """What it is told."""
    words: int
    """Words of the command before its options."""
    common: tuple[str, ...]
    """What most people set."""
    topics: Mapping[str, Topic]
    """Every setting is in one of them."""
    needed: tuple[str, ...] = ()
    """Settings without a default, which every page shows."""


def _of(part: str, names: str) -> tuple[str, ...]:
    return tuple(f"{part}.{name}" for name in names.split())


PAGES = {
    "train": Pages(
        RunConfig,
        2,
        (
            *("out", "model", "prompts", "held_out", "rewards", "device", "resume", "dry_run"),
            *_of("train", "seed iterations batch_size ppo.policy_learning_rate"),
        ),
        {
            "run": Topic(
                "Prompts, rewards, checkpoints and logs.",
                (
                    *("out", "prompts", "held_out", "rewards", "evaluation_rewards", "resume", "save_every"),
                    *("keep_last", "best", "tensorboard", "wandb_project", "dry_run", "gpus"),
                ),
            ),
            "model": Topic("The pipeline.", ("model", "device", "dtype", "base_precision")),
            "pipeline": Topic("How the pipeline is used.", ("pipeline",)),
            "lora": Topic(
                "What is trained of the model.", ("lora", "lora_from", "merged_loras", "full_finetuning")
            ),
            "rollout": Topic(
                "How many trajectories, and how many rollouts of them.",
                _of("train", "seed iterations batch_size rollout_batch_size samples_per_prompt"),
            ),
            "sampler": Topic(
                "How trajectories are made, and their guidance.", _of("train", "sampler ppo.cfg_grad")
            ),
            "advantages": Topic("From rewards to advantages.", ("train.advantages",)),
            "critic": Topic(
                "Where the critic begins, and what it reads.",
                ("critic_from", *_of("train.critic", "trunk num_blocks taps joint_weight lora_rank")),
            ),
            "head": Topic(
                "The critic's head and its loss.",
                _of(
                    "train.critic",
                    "time_conditioning text_conditioning loss num_bins bin_range value_clip num_heads "
                    "head_dim hidden_dim",
                ),
            ),
            "pretrain": Topic(
                "The critic before the first policy update.", ("value_pretraining", "train.pretrain")
            ),
            "ppo": Topic(
                "The policy's loss.",
                _of(
                    "train.ppo",
                    "clip dual_clip ratio kl hold kl_limit gae_lambda lambda_gate advantage_clip target_clip",
                ),
            ),
            "objective": Topic("PPO, or a loss on the forward process.", ("train.objective",)),
            "minibatches": Topic(
                "What an optimizer step learns from.",
                _of(
                    "train.ppo",
                    "balance_steps num_minibatches critic_minibatches critic_rollouts minibatch_draw "
                    "num_inner_epochs timestep_fraction",
                ),
            ),
            "optimizer": Topic(
                "AdamW of actor and critic.",
                _of(
                    "train.ppo",
                    "policy_learning_rate warmup_steps final_learning_rate value_learning_rate "
                    "trunk_learning_rate final_value_learning_rate betas weight_decay adam_eps moments "
                    "max_grad_norm",
                ),
            ),
            "evaluation": Topic(
                "Scores on held-out prompts.",
                _of("train", "eval_every eval_samples eval_batch_size eval_sampler"),
            ),
            "memory": Topic(
                "What fits on a GPU.",
                (
                    "keep_text_encoders",
                    *_of("train", "gradient_checkpointing ppo.microbatch_size critic.keep_features"),
                ),
            ),
            "speed": Topic(
                "What takes less time on a GPU.",
                ("attention_backend", *_of("train", "compile graph rollout_precision")),
            ),
            "gpus": Topic(
                "Several GPUs, and weights that follow later.",
                _of("train", "ema_decay staleness rollout_ranks shard shard_gradients"),
            ),
            "endings": Topic(
                "Rewards and gradients that fail, scores that rise no more.",
                _of("train", "on_reward_error on_bad_gradient early_stopping"),
            ),
        },
    ),
    "steer": Pages(
        SteeringRun,
        1,
        (
            *("source", "prompts", "out", "critic", "rewards", "samples", "device"),
            *_of("settings", "method particles selection seed"),
        ),
        {
            "run": Topic(
                "Model, prompts and what is reported.",
                (
                    *("source", "prompts", "out", "critic", "rewards", "gold", "head_weights", "samples"),
                    *("device", "dtype"),
                ),
            ),
            "sampler": Topic("How images are made.", ("sampler",)),
            "method": Topic(
                "How trajectories are chosen between.",
                _of(
                    "settings",
                    "method particles prune_fractions candidates temperature annealing ess_threshold "
                    "final_choice",
                ),
            ),
            "guidance": Topic(
                "The critic's gradient, what chooses at the end, batches and seeds.",
                _of(
                    "settings",
                    "guidance_weight guidance_form guidance_window selection head_combination batch_size "
                    "seed first_image",
                ),
            ),
        },
        needed=("source", "prompts", "out"),
    ),
}
"""Command -> its help. `lacfast train RECIPE --help` shows the common settings, `--help TOPIC` the others."""


def asked(arguments: Sequence[str]) -> str | None:
    """The topic that help is asked of, "" for the common settings; None: no help, or that of all settings.

    Raises:
        ValueError: for an unknown topic.
    """
    pages = PAGES.get(arguments[0]) if arguments else None
    places = [place for place, word in enumerate(arguments) if word in ("-h", "--help")]
    if pages is None or not places or places[0] < pages.words:
        return None
    following = list(arguments[places[0] + 1 : places[0] + 2])
    if not following or following[0].startswith("-"):
        return ""
    if following[0] not in pages.topics:
        raise unknown("topic of --help", following[0], pages.topics)
    return following[0]


def settings_of(command: str, topic: str) -> dict[type, tuple[str, ...]]:
    """Config -> the fields of it that a page shows; of others all."""
    pages = PAGES[command]
    return _by_config(pages.root, (*pages.needed, *(pages.topics[topic].settings if topic else pages.common)))


def _by_config(root: type[Config], names: Iterable[str]) -> dict[type, tuple[str, ...]]:
    shown: dict[type, dict[str, None]] = {root: {}}
    for name in names:
        kind, *parts = root, *name.split(".")
        for number, part in enumerate(parts):
            shown.setdefault(kind, {})[part] = None
            if number < len(parts) - 1:
                kind = _config(field_types(kind)[part])
    return {kind: tuple(fields) for kind, fields in shown.items()}


def _config(annotation: Any) -> type[Config]:
    """The config that a field holds, whatever it is annotated with."""
    found = [annotation, *get_args(annotation)]
    return next(kind for kind in found if isinstance(kind, type) and issubclass(kind, Config))


def footer(command: str, understood: str, topic: str) -> str:
    """What stands below a page: where the rest is."""
    pages = PAGES[command]
    line = f"{pages.topics[topic].line} " if topic else "These are the settings that most runs change. "
    return f"{line}{understood} --help-all has all, --help TOPIC those of {', '.join(pages.topics)}"


def fitted(text: str, width: int) -> str:
    """Text whose lines are at most `width` wide; boxes are so already."""
    return "\n".join(line for long in text.split("\n") for line in _lines(long, width))


def _lines(line: str, width: int) -> list[str]:
    plain = _CODE.sub("", line)
    if len(plain) <= width or plain[:1] in _BOX:
        return [line]
    # A usage line lists its choices without spaces.
    spaced = plain.replace(",", ", ") if "{" in plain else plain
    return textwrap.wrap(spaced, width, subsequent_indent="  ", break_on_hyphens=False)
