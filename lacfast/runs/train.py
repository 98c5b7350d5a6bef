"""A training run: model, prompts, rewards and trainer put together, kept, and resumed where it stopped."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from lacfast.backbones import adapt_pretrained, load_backbone
from lacfast.backbones.latent import LatentBackbone
from lacfast.checkpoint import give_critic, require_critic
from lacfast.config import from_json, to_json
from lacfast.config.resumption import changes, require_resumable
from lacfast.distributed import World
from lacfast.learning.early_stopping import EarlyStopping
from lacfast.learning.run_state import Counts
from lacfast.metrics import TensorBoardTracker, Tracker, WandbTracker
from lacfast.records import Evaluation
from lacfast.rewards.registry import RewardSet, RewardSpec
from lacfast.rewards.reward import RewardError
from lacfast.rollout.shares import require_ranks
from lacfast.runs.agreement import agreed
from lacfast.runs.capacity import require_memory
from lacfast.runs.config import CHANGEABLE, RunConfig
from lacfast.runs.devices import torch_device
from lacfast.runs.directory import RUN, RunDirectory, require_own, settings_above
from lacfast.runs.embedded import TINY_MODELS, prompts_of, require_flow
from lacfast.runs.keeper import Keeper
from lacfast.runs.phases import (
    EvaluationLines,
    expect_prompts,
    kept_embeddings,
    pretrain_model,
    show_value_pretraining,
)
from lacfast.runs.plan import model_arguments, planned_memory
from lacfast.runs.terminal import PhaseLog, phase_log
from lacfast.runtime.directories import locked, require_whole, whole_directory
from lacfast.runtime.files import write_json
from lacfast.tasks.storage import load_pretrained, save_pretrained
from lacfast.trainer import LatentActorCriticTrainer


def build_backbone(config: RunConfig, directory: RunDirectory, log: PhaseLog) -> LatentBackbone:
    """The model of a run on its device, with the critic that it begins with; a tiny model is pretrained once
    and kept in the directory."""
    backbone = _model(config, directory, log)
    if config.critic_from:
        give_critic(backbone, Path(config.critic_from))
    return backbone


def _model(config: RunConfig, directory: RunDirectory, log: PhaseLog) -> LatentBackbone:
    device = torch_device(config.device)
    if config.model in TINY_MODELS:
        return _tiny_backbone(config, directory.path / "base", device, log, World.current())
    with log.phase("loading", f"Load {config.model}"):
        return load_backbone(
            config.model,
            device=device,
            attention_backend=config.attention_backend or None,
            merged_loras=dict(config.merged_loras),
            **model_arguments(config),
        )


def _tiny_backbone(config: RunConfig, base: Path, device: str, log: PhaseLog, world: World) -> LatentBackbone:
    recipe, file = {"model": config.model, "seed": config.train.seed}, base / "recipe.json"
    # Earlier versions wrote no recipe.
    kept = json.loads(file.read_text(encoding="utf-8")) if file.exists() else recipe
    if world.is_first and (not base.exists() or kept != recipe):
        with whole_directory(base) as target:
            task, backbone = TINY_MODELS[config.model]
            with log.phase("pretraining", f"Pretrain a tiny {backbone}") as phase:
                made = pretrain_model(backbone, task, seed=config.train.seed, steps=None, phase=phase)
            save_pretrained(made, target)
            write_json(target / file.name, recipe)
    world.wait("the pretraining of the tiny model")
    require_whole(base)
    return adapt_pretrained(load_pretrained(base), device=device, lora=config.lora)


def check(config: RunConfig) -> None:
    """Ask for what a run needs before any work: its device, its rewards and the score that says what is best.

    Raises:
        ValueError: for what is unknown or not here; a RewardError for a reward's server or model.
        ImportError: when a reward's optional package is not installed.
    """
    require_ranks(config.train, World.current(), pretrains=config.value_pretraining)
    torch_device(config.device)
    if config.model in TINY_MODELS:
        require_flow(config)
    prompts = prompts_of(config.prompts)
    held_out = prompts_of(config.held_out) if config.held_out else prompts
    specs: tuple[RewardSpec, ...] = (dict(config.rewards), config.evaluation_rewards)
    scorers = [RewardSet.create(spec) for spec in specs if spec]
    RewardSet.require_judges(scorers, prompts, held_out)
    names = [name for scorer in scorers for name in scorer.names]
    for scorer in scorers:
        scorer.check()
    if config.critic_from:
        require_critic(Path(config.critic_from), scorers[0].names)
    EarlyStopping.create(config.train.early_stopping, names)
    if config.best and config.best not in names:
        raise ValueError(
            f"best={config.best!r} is no score of the evaluation; use one of {', '.join(names)}, or name it "
            "with --evaluation-rewards"
        )


def build_trainer(config: RunConfig, directory: RunDirectory, log: PhaseLog) -> LatentActorCriticTrainer:
    """The trainer of a run, before any checkpoint is loaded."""
    prompts = prompts_of(config.prompts)
    held_out = prompts_of(config.held_out) if config.held_out else prompts
    trackers: list[Tracker] = []
    is_first = World.current().is_first
    if config.tensorboard and is_first:
        trackers.append(TensorBoardTracker(directory.path / "tensorboard"))
    if config.wandb_project and is_first:
        settings, run_id = to_json(config), directory.tracked_run()
        trackers.append(WandbTracker(config.wandb_project, directory.path, settings, run_id=run_id))
    # Last, for it may take minutes.
    backbone = build_backbone(config, directory, log)
    if not config.keep_text_encoders:
        backbone.free_text_encoders()
    return LatentActorCriticTrainer(
        backbone,
        dict(config.rewards),
        prompts,
        config.train,
        held_out=held_out,
        evaluation_rewards=list(config.evaluation_rewards) or None,
        metrics_path=directory.metrics if is_first else None,
        trackers=trackers,
    )


def train(
    config: RunConfig,
    on_iteration: Callable[[dict[str, Any]], None] | None = None,
    *,
    tell: Callable[[str], None] = print,
    log: PhaseLog | None = None,
) -> Path:
    """Run `config` to its end, or go on with it; returns the last checkpoint.

    A reward that fails, and a signal that asks to end, leave a checkpoint of the last whole iteration. With
    several ranks all of them call it; the first one writes and tells.

    Args:
        config: of the run.
        on_iteration: gets the metrics of every iteration.
        tell: gets lines that say where the run goes on, with which changes, and how it ended.
        log: where loading, pretraining and evaluations show. None: the terminal.

    Raises:
        ValueError: for settings that cannot work, before any training.
        RewardError: see TrainConfig.on_reward_error.
    """
    out = Path(config.out)
    world = World.current()

    def check_all() -> None:
        require_own(out, RUN)
        check(config)

    # A machine may lack what the others have, as a reward's server.
    agreed(world, check_all, "the checks")
    if not world.is_first:
        on_iteration, tell = None, _silent
    with locked(out) if world.is_first else nullcontext():
        # Nobody touches what another run has.
        world.wait("the directory of the run")
        directory = RunDirectory(out, keep_last=config.keep_last)
        return _train(config, directory, on_iteration, tell, log or phase_log(world), world)


def _silent(line: str) -> None:
    """What a rank says that is not the first: nothing."""


def _train(
    config: RunConfig,
    directory: RunDirectory,
    on_iteration: Callable[[dict[str, Any]], None] | None,
    tell: Callable[[str], None],
    log: PhaseLog,
    world: World,
) -> Path:
    source = world.of_first(directory.resumed(config.resume) if world.is_first else None, "the checkpoint")
    changed = {} if source is None else _changed(config, source)
    if source is None and world.is_first:
        directory.begin()
        directory.write_settings(to_json(config))
    _require_memory(config, source, tell, log)
    trainer = build_trainer(config, directory, log)
    if not config.keep_text_encoders and (place := kept_embeddings(trainer)):
        tell(place)
    score = config.best or trainer.early_stopping.score
    keeper = Keeper(trainer, directory, score, to_json(config))
    pretrains = config.value_pretraining and trainer.critic is not None
    if source is not None:
        trainer.load(source)
        done, planned, phase = trainer.iteration, config.train.iterations, ""
        if trainer.pretraining.is_under_way:
            done, planned = trainer.pretraining.iteration, config.train.pretrain.iterations
            phase = " of value pretraining"
        tell(f"goes on from {source}, iteration {done} of {planned}{phase}")
        for name, (old, new) in changed.items():
            tell(f"{name} was {old!r} and is {new!r} from here on")
        counts = Counts(trainer.iteration, trainer.images, trainer.evaluated)
        if world.is_first:
            directory.go_on_from(source, counts, trainer.pretraining, is_same=not changed)
            directory.write_settings(to_json(config))
        keeper.has_saved(source)
        pretrains = trainer.pretraining.is_under_way

    def save_when_due(iteration: int) -> None:
        if config.save_every and iteration % config.save_every == 0:
            keeper.save()

    def after_iteration(metrics: dict[str, Any]) -> None:
        expect_prompts(trainer)
        save_when_due(trainer.iteration)
        if on_iteration is not None:
            on_iteration(metrics)

    def after_evaluation(evaluation: Evaluation) -> None:
        lines.scores(evaluation)
        keeper.keep(evaluation)

    try:
        if pretrains:
            show_value_pretraining(trainer, log, lambda: save_when_due(trainer.pretraining.iteration))
            pretrains = False
        keeper.save()
        expect_prompts(trainer)
        with EvaluationLines(log) as lines:
            trainer.watch_evaluation = lines.images
            done = trainer.train(on_iteration=after_iteration, on_evaluation=after_evaluation)
        last = keeper.save()
    except (KeyboardInterrupt, RewardError):
        # Until value pretraining has begun there is nothing to go on from.
        if trainer.indivisible.is_whole and (trainer.pretraining.is_under_way or not pretrains):
            tell(f"stopped; {keeper.save()} has the last whole iteration, and --resume auto goes on from it")
        raise
    finally:
        trainer.close()
    if trainer.early_stopping.is_exhausted:
        tell(f"ended early: {trainer.early_stopping.patience} evaluations in a row without a better score")
    elif not done:
        tell(f"all {config.train.iterations} iterations were done before; --train.iterations asks for more")
    return last


def _require_memory(
    config: RunConfig, source: Path | None, tell: Callable[[str], None], log: PhaseLog
) -> None:
    """Refuse a run that cannot fit, and tell which batches will be halved; a tiny model's always does.

    Raises:
        ValueError: see capacity.require_memory.
    """
    if config.model in TINY_MODELS:
        return
    device = torch_device(config.device)
    # A checkpoint of iteration 0 may be from within it.
    pretrains = config.value_pretraining and (source is None or source.name == f"{0:08d}")
    with log.phase("planning", "Plan the memory"):
        planned = planned_memory(config, device=device, pretrains=pretrains, ranks=World.current().size)
    for line in require_memory(planned, torch.device(device)):
        tell(line)


def _changed(config: RunConfig, source: Path) -> dict[str, tuple[Any, Any]]:
    """The settings that change where a run goes on, with both values.

    Raises:
        ValueError: for one that must not.
    """
    stored = settings_above(source, 2)
    if stored is None:
        return {}
    before = from_json(RunConfig, stored)
    require_resumable(before, config, CHANGEABLE)
    return {name: pair for name, pair in changes(before, config).items() if name not in ("out", "resume")}
