"""The phases that runs and the demo share, each with its line in the terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from itertools import chain
from types import TracebackType
from typing import Self

from torch import Tensor

from lacfast.backbones.latent import LatentBackbone
from lacfast.distributed import ALONE, World
from lacfast.learning.value_pretraining import PretrainResult
from lacfast.prompts import PromptSet
from lacfast.records import Evaluation
from lacfast.runs.terminal import Phase, PhaseLog, scores_line
from lacfast.tasks.models import BackboneName
from lacfast.tasks.pretraining import Pretrained, pretrain
from lacfast.tasks.task import Task
from lacfast.trainer import LatentActorCriticTrainer


def pretrain_model(
    backbone: BackboneName,
    task: Task,
    *,
    seed: int,
    steps: int | None,
    phase: Phase,
    world: World = ALONE,
) -> Pretrained:
    """The tiny model of a task, pretrained within a phase."""

    def report(step: int, total: int, loss: float) -> None:
        phase.update((step + 1) / total, f"step {step + 1}/{total}, loss {loss:.3f}")

    return pretrain(backbone, task, seed=seed, steps=steps, progress=report, world=world)


def expect_prompts(trainer: LatentActorCriticTrainer, before: Iterable[PromptSet] = ()) -> None:
    """Tell the model which prompts the run draws next; those of value pretraining come `before`."""
    backbone = trainer.backbone
    assert isinstance(backbone, LatentBackbone)
    source = trainer.source
    upcoming = trainer.draws.upcoming(
        trainer.iteration,
        evaluated=trainer.evaluated,
        samples=source.is_server or source.ranks is None,
        judges=not source.is_server,
    )
    draws = chain(((draw, trainer.world) for draw in before), ((draw, source.world) for draw in upcoming))
    backbone.expect_prompts(draw.of_share(world.share(len(draw))).texts for draw, world in draws)


def kept_embeddings(trainer: LatentActorCriticTrainer) -> str:
    """Where the embeddings of prompts are kept, and how large they are; empty where they are not."""
    backbone = trainer.backbone
    assert isinstance(backbone, LatentBackbone)
    files, size = backbone.prompts.files, backbone.prompts.entry_bytes
    return (
        ""
        if files is None
        else f"keeps embeddings of prompts, {size / 2**20:.1f} MiB each, in {files.directory}"
    )


def show_value_pretraining(
    trainer: LatentActorCriticTrainer, log: PhaseLog, after_iteration: Callable[[], object] = lambda: None
) -> PretrainResult:
    """Value pretraining with what the critic explains by now; it may be saved in `after_iteration`."""
    planned = trainer.config.pretrain.iterations
    trained = trainer.table.trainable_steps

    states = "held-out states" if trainer.config.pretrain.held_out_samples else "the states of its rollout"

    def mean(variance: Tensor) -> str:
        return f"explained variance {float(variance[trained].mean()):.2f} on {states}"

    draws, state = trainer.draws, trainer.pretraining
    made = [*state.kept, *range(state.iteration, planned)]
    expect_prompts(trainer, chain([draws.selection()], map(draws.pretraining, made)))
    with log.phase("value_pretraining", "Value pretraining, actor frozen") as phase:

        def show(iteration: int, variance: Tensor) -> None:
            phase.update((iteration + 1) / planned, mean(variance))
            after_iteration()
            expect_prompts(trainer, map(draws.pretraining, range(iteration + 1, planned)))

        result = trainer.pretrain_critic(show)
        phase.note = mean(result.explained_variance)
    return result


class EvaluationLines:
    """The evaluations of a run as they come: progress while images are made, then their scores."""

    def __init__(self, log: PhaseLog) -> None:
        self._log = log
        self._open = ExitStack()
        self._phase: Phase | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.__exit__(kind, error, trace)

    def images(self, made: int, planned: int) -> None:
        """Tell how many images of the evaluation are made."""
        if self._phase is None:
            self._phase = self._open.enter_context(self._log.phase("evaluation", "Evaluation"))
        self._phase.images(made, planned)

    def scores(self, evaluation: Evaluation) -> None:
        """End the evaluation's line with what it found."""
        if self._phase is not None:
            self._phase.note = scores_line(evaluation)
        self._open.close()
        self._phase = None
