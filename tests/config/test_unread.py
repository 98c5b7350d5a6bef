"""Every option of every config: nothing reads it in a context, which refuses it, or it is always read."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import fields, replace
from typing import Any, NamedTuple

import pytest
from every_config import CONFIGS, REQUIRED
from refusals import Refusal

from lacfast.compat.trl_config import DDPOConfig
from lacfast.config import (
    AWM,
    GRPO,
    NFT,
    AdvantageConfig,
    BatchMean,
    CriticConfig,
    Fixed,
    ForwardProcess,
    GraphConfig,
    Hold,
    LoRAConfig,
    Nats,
    PPOConfig,
    SamplerConfig,
    SteeringConfig,
    TrainConfig,
    ValuePretrainingConfig,
    from_json,
    to_json,
    variant,
)
from lacfast.config.checks import Config, field_types
from lacfast.runs.config import RunConfig
from lacfast.runs.recipes import recipe, recipe_names


class Row(NamedTuple):
    """An option that nothing reads in a context. Options of a part are "ppo.gae_lambda"."""

    kind: type[Config]
    """What knows of the context."""
    context: dict[str, Any]
    option: str
    value: Any
    """Another one than the default."""
    reader: dict[str, Any]
    """What differs from the defaults where the option is read."""


def rows(
    kind: type[Config],
    context: dict[str, Any],
    options: dict[str, Any],
    reader: dict[str, Any] | None = None,
) -> list[Row]:
    return [Row(kind, context, option, value, reader or {}) for option, value in options.items()]


def built(kind: type[Config], settings: dict[str, Any]) -> Any:
    """A config of dotted options, the others at their defaults."""
    parts: defaultdict[str, dict[str, Any]] = defaultdict(dict)
    own = dict(REQUIRED.get(kind, {}))
    for name, value in settings.items():
        part, _, inner = name.partition(".")
        if inner:
            parts[part][inner] = value
        else:
            own[part] = value
    types = field_types(kind)
    return kind(**own | {part: built(types[part], inner) for part, inner in parts.items()})


CRITICLESS = {"critic.trunk": "none", "advantages.estimator": BatchMean()}
HEAD = {
    "time_conditioning": False, "text_conditioning": "tokens", "loss": "hl_gauss", "num_heads": 8,
    "head_dim": 16, "hidden_dim": 64,
}  # fmt: skip
PRETRAINING = {
    "iterations": 3, "kept_rollouts": 3, "passes": 1.0, "minibatch_size": 8, "held_out_samples": 4,
    "patience": 2, "completions": 4,
}  # fmt: skip
PRETRAINED = {f"pretrain.{name}": value for name, value in PRETRAINING.items()}
BOUNDS = {"completions": 4}
IGNORED = [
    *rows(CriticConfig, {"trunk": "none"}, HEAD),
    *rows(CriticConfig, {}, {"num_bins": 11, "bin_range": 3.0}, {"loss": "hl_gauss"}),
    *rows(CriticConfig, {"loss": "bce"}, {"value_clip": 0.2}),
    *rows(CriticConfig, {"trunk": "shared"}, {"num_blocks": 2}),
    *rows(CriticConfig, {}, {"taps": (0.5,)}, {"trunk": "shared"}),
    *rows(CriticConfig, {}, {"joint_weight": 1.0}, {"trunk": "joint"}),
    *rows(CriticConfig, {}, {"lora_rank": 4}, {"trunk": "lora"}),
    *rows(CriticConfig, {"trunk": "copy"}, {"keep_features": False}),
    *rows(AdvantageConfig, {}, {"conditions": (("a", "b", 0.5),)}, {"combination": "conditional"}),
    *rows(AdvantageConfig, {}, {"floors": (("a", 0.5),)}, {"combination": "constrained"}),
    *rows(
        AdvantageConfig,
        {},
        {"multiplier_learning_rate": 0.2, "multiplier_maximum": 2.0},
        {"combination": "constrained", "floors": (("a", 0.5),)},
    ),
    *rows(GraphConfig, {"mode": "off"}, {"warmup_steps": 1, "strict": True}),
    *rows(PPOConfig, {}, {"lambda_gate": 0.2}, {"gae_lambda": 0.9}),
    *rows(SamplerConfig, {"kind": "ode", "noise_level": 0.0}, {"window": Fixed((0, 2)), "noise_level": 0.5}),
    *rows(ValuePretrainingConfig, {}, {"bound_states": 8, "stop_score": 0.5}, BOUNDS),
    *rows(ValuePretrainingConfig, {"held_out_samples": 0}, BOUNDS),
    *rows(TrainConfig, CRITICLESS, PRETRAINED),
    *rows(
        TrainConfig,
        CRITICLESS,
        {
            "ppo.gae_lambda": 0.9, "ppo.target_clip": 3.0, "ppo.critic_minibatches": 2,
            "ppo.critic_rollouts": 2, "ppo.value_learning_rate": 0.1, "ppo.trunk_learning_rate": 0.1,
            "ppo.final_value_learning_rate": 0.0,
        },
    ),
    *rows(TrainConfig, {"critic.trunk": "joint"}, {"ppo.trunk_learning_rate": 0.1}),
    *rows(TrainConfig, {"critic.trunk": "shared"}, {"ppo.trunk_learning_rate": 0.1}),
    *rows(
        TrainConfig,
        {"critic.keep_features": False},
        {"ppo.critic_minibatches": 2, "ppo.critic_rollouts": 2},
    ),
    *rows(TrainConfig, {}, {"ppo.cfg_grad": "both"}, {"sampler.guidance_scale": 2.0}),
    *(
        row
        for kind in (ForwardProcess, NFT, AWM)
        for row in rows(kind, {"old_decay": 0.0}, {"old_decay_rate": 0.1, "old_hold": 2})
    ),
    *rows(
        TrainConfig,
        {"objective": NFT()},
        {
            "ppo.clip": Nats(5), "ppo.dual_clip": 3.0, "ppo.ratio": "ratio_norm", "ppo.kl_limit": 1.0,
            "ppo.balance_steps": True, "ppo.gae_lambda": 0.9, "ppo.hold": Hold(1e-2),
        },
    ),
    *rows(TrainConfig, {}, {"shard_gradients": True}, {"shard": 2}),
    *rows(TrainConfig, {"shard": 2}, {"graph.warmup_steps": 1, "graph.strict": True}),
    *rows(TrainConfig, {}, {"early_stopping.patience": 2}, {"eval_every": 1}),
    *rows(
        RunConfig,
        {"model": "shapes-dit"},
        {
            "dtype": "bfloat16", "attention_backend": "sdpa", "pipeline.resolution": (64, 64),
            "pipeline.num_frames": 9, "pipeline.judged_frames": 2,
            "pipeline.max_sequence_length": 8, "pipeline.embedded_guidance": 3.0,
            "pipeline.vae_dtype": "bfloat16", "pipeline.vae_slicing": True, "pipeline.vae_tiling": True,
            "lora_from": "somebody/ink", "merged_loras": (("somebody/ink", 1.0),),
        },
        {"model": "pipeline"},
    ),
    *rows(
        RunConfig,
        {"model": "pipeline"},
        {"pipeline.negative_prompt": "blurred"},
        {"model": "pipeline", "train.sampler.guidance_scale": 2.0},
    ),
    *rows(RunConfig, {}, {"gpus": 4}, {"dry_run": True}),
    *rows(RunConfig, {"full_finetuning": True}, {"lora": LoRAConfig()}),
    *rows(
        RunConfig,
        {"model": "shapes-dit", "lora": LoRAConfig()},
        {"base_precision": "int8"},
        {"model": "pipeline", "lora": LoRAConfig()},
    ),
    *rows(
        RunConfig,
        {"model": "pipeline"},
        {"base_precision": "int8"},
        {"model": "pipeline", "lora": LoRAConfig()},
    ),
    *rows(
        RunConfig,
        {"model": "pipeline", "full_finetuning": True},
        {"base_precision": "int8"},
        {"model": "pipeline", "lora": LoRAConfig()},
    ),
    *rows(
        RunConfig,
        {"full_finetuning": True, "model": "pipeline"},
        {"lora_from": "somebody/ink"},
        {"model": "pipeline"},
    ),
    *rows(
        RunConfig,
        {"lora_from": "somebody/ink", "model": "pipeline"},
        {"lora": LoRAConfig()},
    ),
    *rows(
        RunConfig,
        {"value_pretraining": False},
        {f"train.{name}": value for name, value in PRETRAINED.items()},
    ),
    *rows(
        RunConfig,
        {},
        {
            "best": "shapes", "evaluation_rewards": ("shapes_gold",), "train.eval_samples": 8,
            "train.eval_batch_size": 8, "train.early_stopping.score": "shapes",
        },
        {"train.eval_every": 1},
    ),
    *rows(RunConfig, {"value_pretraining": False}, {"held_out": "shapes-held-out"}),
    *rows(
        RunConfig,
        {f"train.{name}": value for name, value in CRITICLESS.items()},
        {"critic_from": "runs/red"},
    ),
    *rows(RunConfig, {"train.pretrain.held_out_samples": 0}, {"held_out": "shapes-held-out"}),
    *rows(
        SteeringConfig,
        {"method": "best_of_n"},
        {"prune_fractions": (0.5,)},
    ),
    *rows(SteeringConfig, {}, {"candidates": 2, "temperature": 0.1}, {"method": "beam"}),
    *rows(
        SteeringConfig,
        {},
        {"annealing": 0.5, "ess_threshold": 0.9, "final_choice": "best"},
        {"method": "smc"},
    ),
    *rows(
        SteeringConfig,
        {},
        {"guidance_form": "score", "guidance_window": (0.3, 0.8)},
        {"guidance_weight": 0.1},
    ),
]  # fmt: skip
READ = {
    "AdvantageConfig": "estimator combination",
    "CriticConfig": "trunk",
    "Demo": "out budget seed backbone processes quick",
    "EvaluationRun": "source prompts rewards sampler samples batch_size seed device dtype out",
    "GraphConfig": "mode",
    "LoRAConfig": "rank alpha target_modules seed",
    "PPOConfig": (
        "kl advantage_clip num_minibatches minibatch_draw num_inner_epochs timestep_fraction "
        "microbatch_size policy_learning_rate warmup_steps "
        "final_learning_rate betas "
        "weight_decay adam_eps moments max_grad_norm"
    ),
    "RetryConfig": "timeout_s give_up_s max_bad_answers backoff_s max_backoff_s jitter",
    "RunConfig": (
        "out model prompts rewards device full_finetuning keep_text_encoders value_pretraining save_every "
        "keep_last resume tensorboard wandb_project dry_run train pipeline"
    ),
    "SamplerConfig": "kind num_steps shift guidance_scale",
    "SteeringConfig": (
        "method particles selection guidance_weight head_combination batch_size seed first_image"
    ),
    "SteeringRun": (
        "source prompts out critic rewards gold head_weights samples sampler settings device dtype"
    ),
    "TrainConfig": (
        "seed batch_size rollout_batch_size samples_per_prompt iterations sampler objective advantages "
        "critic ppo pretrain ema_decay graph gradient_checkpointing compile rollout_precision staleness "
        "rollout_ranks shard eval_every early_stopping eval_sampler on_reward_error on_bad_gradient"
    ),
    # A choice is there with all that it reads, or not at all.
    "Fixed": "steps", "Random": "size within", "Sliding": "size every stride within",
    "PPO": "", "ForwardProcess": "steps old_decay", "NFT": "steps old_decay beta",
    "AWM": "steps old_decay power old_weight",
    "Ratio": "clip_range", "Nats": "clip_nats", "KLMask": "kl_threshold",
    "KLPenalty": "weight kind target anchor", "Hold": "weight share",
    "CriticValues": "", "GroupBaseline": "std", "GRPO": "std", "LeaveOneOut": "std",
    "DDPO": "buffer_size min_count", "BatchMean": "",
}  # fmt: skip
"""Options that something reads in every context, by hand."""


def owner(row: Row) -> str:
    """Config and field of a row's option."""
    kind, *inner = row.kind, *row.option.split(".")
    for part in inner[:-1]:
        kind = field_types(kind)[part]
    return f"{kind.__name__}.{inner[-1]}"


def test_every_option_is_always_read_or_refused_where_it_is_not() -> None:
    """TRL's DDPOConfig means what TRL means by it."""
    declared = {
        f"{kind.__name__}.{field.name}"
        for kind in CONFIGS
        for field in fields(kind)  # type: ignore[arg-type]
        if kind is not DDPOConfig
    }
    read = {f"{kind}.{name}" for kind, names in READ.items() for name in names.split()}
    refused = {owner(row) for row in IGNORED}
    assert declared == read | refused
    assert not read & refused


@pytest.mark.parametrize("row", IGNORED, ids=lambda row: f"{owner(row)}-{row.context}")
def test_an_option_that_nothing_reads_is_refused(row: Row) -> None:
    built(row.kind, row.context)
    with pytest.raises(ValueError, match=row.option.rpartition(".")[2]):
        built(row.kind, row.context | {row.option: row.value})
    built(row.kind, row.reader | {row.option: row.value})


def test_the_refusal_names_options_reason_and_defaults() -> None:
    with Refusal(
        "ppo.gae_lambda=0.95, ppo.critic_rollouts=4 would be ignored: advantages.estimator=grpo has no",
        cause="Options of a critic for an estimator that has none.",
        remedy="leave it out, the default is ppo.gae_lambda=1.0, ppo.critic_rollouts=1",
    ).raised():
        TrainConfig(
            advantages=AdvantageConfig(estimator=GRPO()),
            critic=CriticConfig(trunk="none"),
            samples_per_prompt=8,
            ppo=PPOConfig(gae_lambda=0.95, critic_rollouts=4),
        )
    with Refusal(
        "hidden_dim=256 would be ignored: trunk='none' has no head",
        cause="The shape of a critic's head without a critic.",
        remedy="leave it out, the default is hidden_dim=128",
    ).raised():
        CriticConfig(trunk="none", hidden_dim=256)
    with Refusal(
        "ppo.trunk_learning_rate=0.001 would be ignored: critic.trunk='shared' has no weights of its own",
        cause="A rate for a trunk that is the actor's own.",
        remedy="leave it out",
    ).raised():
        TrainConfig(critic=CriticConfig(trunk="shared"), ppo=PPOConfig(trunk_learning_rate=1e-3))
    with Refusal(
        "ppo.cfg_grad='both' would be ignored: guidance_scale=1 runs without the unconditional half",
        cause="A gradient of guidance without guidance.",
        remedy="leave it out",
    ).raised():
        TrainConfig(ppo=PPOConfig(cfg_grad="both"))
    with Refusal(
        "lambda_gate=0.5 would be ignored where gae_lambda is 1",
        cause="A gate of a lambda that trusts no value anyway.",
        remedy="use gae_lambda < 1",
    ).raised():
        PPOConfig(lambda_gate=0.5)
    with Refusal(
        "bound_states=32 would be ignored: completions=0 measures no bounds",
        cause="An option of the floor and ceiling that are not measured.",
        remedy="leave it out",
    ).raised():
        ValuePretrainingConfig(bound_states=32)
    with Refusal(
        "guidance_form='score' would be ignored: guidance_weight=0 takes no gradient",
        cause="A form of guidance without its weight.",
        remedy="leave it out",
    ).raised():
        SteeringConfig(guidance_form="score")
    with Refusal(
        "warmup_steps=1 would be ignored: mode='off' captures nothing",
        cause="An option of graphs where there are none.",
        remedy="leave it out",
    ).raised():
        GraphConfig(mode="off", warmup_steps=1)


RUN: dict[str, Any] = REQUIRED[RunConfig]


@pytest.mark.parametrize(
    ("changes", "refusal"),
    [
        (
            {"dtype": "bfloat16"},
            Refusal(
                "dtype='bfloat16' would be ignored: model='shapes-dit' is made on the spot",
                cause="A pipeline's option for a model that is pretrained on the spot.",
                remedy="leave it out, the default is dtype='float32'",
            ),
        ),
        (
            {"full_finetuning": True, "lora": LoRAConfig(rank=8)},
            Refusal(
                "would be ignored: full_finetuning=True trains all weights",
                cause="An adapter where all weights are trained.",
                remedy="leave it out, the default is lora=None",
            ),
        ),
        (
            {"value_pretraining": False, "train": TrainConfig(pretrain=ValuePretrainingConfig(patience=2))},
            Refusal(
                "train.pretrain.patience=2 would be ignored: value_pretraining=False",
                cause="An option of value pretraining that is left out.",
                remedy="the default is train.pretrain.patience=4",
            ),
        ),
        (
            {"best": "shapes"},
            Refusal(
                "best='shapes' would be ignored: train.eval_every=0 evaluates nothing",
                cause="A best checkpoint, or a score that is reported, without evaluations.",
                remedy="leave it out, the default is best=''",
            ),
        ),
        (
            {"held_out": "shapes-held-out", "value_pretraining": False},
            Refusal(
                "held_out='shapes-held-out' would be ignored",
                cause="Held-out prompts that nothing asks for.",
                remedy="leave it out, the default is held_out=''",
            ),
        ),
    ],
)
def test_a_run_refuses_what_it_would_ignore(changes: dict[str, Any], refusal: Refusal) -> None:
    with refusal.raised():
        RunConfig(**RUN | changes)


def test_a_variant_forgets_what_its_preset_set_and_nothing_reads() -> None:
    preset = recipe("shapes-ppo").train
    changes: dict[str, Any] = {
        "critic": CriticConfig(trunk="none"), "advantages": AdvantageConfig(estimator=BatchMean())
    }  # fmt: skip
    with pytest.raises(ValueError, match="would be ignored"):
        replace(preset, **changes)
    baseline = variant(preset, **changes)
    assert baseline.pretrain == ValuePretrainingConfig()
    assert baseline.ppo == replace(preset.ppo, gae_lambda=1.0, trunk_learning_rate=3e-4)
    assert variant(baseline, critic=preset.critic, advantages=preset.advantages).ppo.gae_lambda == 1
    assert variant(preset, seed=3) == replace(preset, seed=3)


def test_a_variant_refuses_what_is_asked_for_and_nothing_reads() -> None:
    preset = recipe("shapes-ppo").train
    with pytest.raises(ValueError, match=r"^ppo.gae_lambda=0.5 would be ignored"):
        variant(
            preset,
            critic=CriticConfig(trunk="none"),
            advantages=AdvantageConfig(estimator=BatchMean()),
            ppo=replace(preset.ppo, gae_lambda=0.5),
        )
    with pytest.raises(ValueError, match=r"^train.pretrain.patience=3 would be ignored"):
        variant(
            recipe("shapes-ppo"),
            value_pretraining=False,
            train=replace(preset, pretrain=replace(preset.pretrain, patience=3)),
        )


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_does_without_value_pretraining_evaluations_and_lora(name: str) -> None:
    preset = recipe(name)
    short = variant(
        preset,
        value_pretraining=False,
        full_finetuning=True,
        train=replace(preset.train, eval_every=0),
    )
    assert (short.lora, short.best, short.held_out) == (None, "", "")
    assert short.train.pretrain == ValuePretrainingConfig()


def test_a_file_of_an_earlier_version_may_hold_what_nothing_reads() -> None:
    stored = to_json(built(TrainConfig, CRITICLESS))
    stored["ppo"] |= {"gae_lambda": 0.95, "lambda_gate": 0.2}
    stored["pretrain"]["passes"] = 2.0
    stored["critic"]["hidden_dim"] = 256
    assert from_json(TrainConfig, stored) == built(TrainConfig, CRITICLESS)
