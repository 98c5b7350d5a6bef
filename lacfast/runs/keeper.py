"""What a run keeps: numbered checkpoints, the best one, pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lacfast.checkpoint import save_backbone
from lacfast.records import Evaluation
from lacfast.report.pictures import contact_sheet, save_with_prompts, shown_in_sheet
from lacfast.runs.directory import SCORE, SETTINGS, RunDirectory
from lacfast.trainer import LatentActorCriticTrainer


class Keeper:
    """Writes what a run keeps."""

    def __init__(
        self,
        trainer: LatentActorCriticTrainer,
        directory: RunDirectory,
        score: str,
        settings: dict[str, Any],
    ) -> None:
        """`score` chooses the best; `settings` of the run lie beside every save as run.json."""
        self.trainer = trainer
        self.directory = directory
        self.score = score
        self.settings = settings
        self._saved: tuple[Any, ...] = ()

    def has_saved(self, checkpoint: Path) -> None:
        """Take in that the trainer is as it is in `checkpoint`, which may be this run's own."""
        if checkpoint.resolve() == self.directory.checkpoint(self.trainer.iteration).resolve():
            self._saved = self._now()

    def _now(self) -> tuple[Any, ...]:
        """Where the trainer is."""
        trainer, pretraining = self.trainer, self.trainer.pretraining
        return trainer.iteration, trainer.evaluated, pretraining.iteration, pretraining.is_under_way

    def save(self) -> Path:
        """A checkpoint of now, unless it was the last thing that was saved; returns it."""
        trainer = self.trainer
        target, now = self.directory.checkpoint(trainer.iteration), self._now()
        if self._saved != now:
            trainer.save(target, notes={SETTINGS: self.settings})
            self._saved = now
            if trainer.world.is_first:
                self.directory.prune()
        return target

    def keep(self, evaluation: Evaluation) -> None:
        """A picture of the evaluation, and the weights it judged if they are the best so far."""
        trainer, directory, world = self.trainer, self.directory, self.trainer.source.world
        found, is_best = evaluation.means()[self.score], False
        if world.is_first:
            picture = contact_sheet(evaluation.images)
            prompts = evaluation.prompts[: shown_in_sheet(evaluation.images)]
            save_with_prompts(picture, directory.samples(trainer.iteration), prompts)
            trainer.log.picture(trainer.iteration, "samples", picture)
            best = directory.best_score(self.score)
            is_best = best is None or found > best
        if world.of_first(is_best, "the best score"):
            kept = {"score": found, "name": self.score, "iteration": trainer.iteration}
            notes = {SCORE: kept, SETTINGS: self.settings}
            with trainer.averaged():
                save_backbone(trainer.backbone, directory.best, notes, world)
