"""The directory of a training run: settings, metrics, pictures, and the checkpoints that are kept."""

from __future__ import annotations

import json
import math
import os
import re
import secrets
import shutil
import warnings
from pathlib import Path
from typing import Any

from lacfast.checkpoint import TRAINER_STATE, read_state
from lacfast.learning.pretraining_state import PretrainingState
from lacfast.learning.run_state import Counts
from lacfast.runtime.directories import MANIFEST, DamagedError, recover_all, remove
from lacfast.runtime.files import write_json, writing_to

BEST = "best"
SCORE = "score.json"
SETTINGS = "run.json"
TRACKED_RUN = "wandb-run"
_NUMBERED = re.compile(r"\d{8}|[1-9]\d{8,}")


_KINDS = {
    "a run of lacfast train": ("checkpoints",),
    "a demo": ("pretrained", "summary.json"),
    "steered images": ("statistics.json",),
    "an evaluation": ("scores.json",),
    "a saved model": (MANIFEST, TRAINER_STATE, "lacfast.json", "model_index.json"),
}
"""What a directory holds -> the names that tell."""
RUN, DEMO, STEERED, EVALUATION, _ = _KINDS


def require_own(directory: Path, kind: str) -> None:
    """Refuse a directory whose files are those of another command, which some of `kind` would overwrite.

    Raises:
        ValueError: naming what is there.
    """
    names = ((found, name) for found, names in _KINDS.items() for name in names)
    held = next((found for found, name in names if (directory / name).exists()), kind)
    if held != kind:
        raise ValueError(f"{directory} holds {held}, with which {kind} would mix; choose another --out")


def settings_above(path: Path, levels: int) -> dict[str, Any] | None:
    """The run's settings in a directory, or in the nearest of so many above it; None where no run wrote any.

    A checkpoint has its own; earlier versions wrote its run's alone.
    """
    path = path.absolute()
    for directory in (path, *path.parents[:levels]):
        if (directory / SETTINGS).is_file():
            stored: dict[str, Any] = json.loads((directory / SETTINGS).read_text(encoding="utf-8"))
            return stored
    return None


class RunDirectory:
    """Layout of a run: run.json, metrics.jsonl, samples/, checkpoints/00000010, checkpoints/best."""

    def __init__(self, path: Path, *, keep_last: int) -> None:
        """
        Args:
            path: made when it does not exist.
            keep_last: numbered checkpoints that stay, at least 1; the best one stays besides.

        Raises:
            ValueError: when the directory cannot be written.
        """
        if keep_last < 1:
            raise ValueError(f"keep_last={keep_last} must be at least 1, or no run could be resumed")
        self.path = path
        self.keep_last = keep_last
        with writing_to(path):
            (path / "samples").mkdir(parents=True, exist_ok=True)
            (path / "checkpoints").mkdir(exist_ok=True)

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def best(self) -> Path:
        return self.path / "checkpoints" / BEST

    def checkpoint(self, iteration: int) -> Path:
        return self.path / "checkpoints" / f"{iteration:08d}"

    def samples(self, iteration: int) -> Path:
        return self.path / "samples" / f"{iteration:08d}.png"

    def checkpoints(self) -> list[Path]:
        """The numbered checkpoints, oldest first; what else lies there is none of the run's."""
        found = [path for path in (self.path / "checkpoints").iterdir() if _NUMBERED.fullmatch(path.name)]
        return sorted((path for path in found if path.is_dir()), key=lambda path: int(path.name))

    def prune(self) -> None:
        """Remove all but the latest checkpoints."""
        for path in self.checkpoints()[: -self.keep_last]:
            remove(path)

    def best_score(self, name: str) -> float | None:
        """What the best checkpoint scored; None before there is one by the score of that name."""
        path = self.best / SCORE
        if not path.exists():
            return None
        kept = json.loads(path.read_text(encoding="utf-8"))
        # Earlier versions kept no name.
        return float(kept["score"]) if kept.get("name", name) == name else None

    def write_settings(self, settings: dict[str, Any]) -> None:
        write_json(self.path / SETTINGS, settings)

    def resumed(self, resume: str) -> Path | None:
        """The checkpoint to go on from: "auto" the latest here if any, "never" none, else the path itself.

        What dead saves left is removed. A checkpoint that is damaged is set aside under "auto", with a
        warning, and the one before it taken.

        Raises:
            ValueError: when "never" would mix a new run into an old one, or the path holds no checkpoint.
            DamagedError: when the path is damaged, or every checkpoint here.
        """
        for parent in (self.path, self.path / "checkpoints"):
            recover_all(parent)
        found = self.checkpoints()
        if resume == "auto":
            return self._latest_whole(found)
        if resume == "never":
            if found or self.metrics.exists():
                raise ValueError(
                    f"{self.path} already holds a run; choose another directory, or --resume auto to go on"
                )
            return None
        if not (Path(resume) / TRAINER_STATE).exists():
            raise ValueError(
                f"{resume} holds no {TRAINER_STATE}; pass a checkpoint directory, 'auto' or 'never'"
            )
        read_state(Path(resume))
        return Path(resume)

    def _latest_whole(self, found: list[Path]) -> Path | None:
        damaged = []
        for path in reversed(found):
            try:
                read_state(path)
            except DamagedError as error:
                warnings.warn(str(error), stacklevel=3)
                damaged.append(path)
                continue
            self._set_aside(damaged)
            return path
        if damaged:
            raise DamagedError(
                f"every checkpoint in {self.path / 'checkpoints'} is damaged; restore one from a copy, or "
                "start again with another --out"
            )
        return None

    def begin(self) -> None:
        """Forget what a run left here that ended before its first checkpoint.

        Raises:
            ValueError: for metrics that no run of `lacfast train` wrote.
        """
        (self.path / TRACKED_RUN).unlink(missing_ok=True)
        if not self.metrics.exists():
            return
        if not (self.path / SETTINGS).exists():
            raise ValueError(
                f"{self.metrics} is of no run of lacfast train, which would replace it; choose another --out"
            )
        self.metrics.unlink()

    def tracked_run(self) -> str:
        """The id by which a tracking service knows this run, the same after a kill."""
        kept = self.path / TRACKED_RUN
        if not kept.exists():
            kept.write_text(secrets.token_hex(4), encoding="utf-8")
        return kept.read_text(encoding="utf-8")

    def go_on_from(
        self, checkpoint: Path, counts: Counts, pretraining: PretrainingState, *, is_same: bool
    ) -> None:
        """Make the checkpoint the last word: what was logged later will be logged again.

        What lies here of another branch that went on from there, or of another run, is set aside.

        Args:
            checkpoint: of this directory or another.
            counts: of the checkpoint.
            pretraining: the same of value pretraining.
            is_same: the run goes on with the settings that it had, so it makes the same again.
        """
        is_own = checkpoint.absolute().parent == (self.path / "checkpoints").absolute()
        first = counts.iteration + 1 if is_own else 0
        later = [path for path in self.checkpoints() if int(path.name) >= first]
        if later or not is_same:
            score = self.best / SCORE
            if score.exists() and json.loads(score.read_text(encoding="utf-8"))["iteration"] >= first:
                later.append(self.best)
            pictures = [path for path in (self.path / "samples").iterdir() if _NUMBERED.fullmatch(path.stem)]
            later += sorted(path for path in pictures if int(path.stem) >= first)
            self._set_aside(later, copied=[self.metrics])
        if not is_own:
            self.metrics.unlink(missing_ok=True)
        self._rewind_metrics(counts, pretraining)

    def _set_aside(self, paths: list[Path], copied: list[Path] | None = None) -> None:
        """Move what is replaced to replaced/1, 2 and so on, under the names that it has here."""
        if not paths:
            return
        root = self.path / "replaced"
        number = 1 + max((int(path.name) for path in root.glob("[0-9]*") if path.name.isdigit()), default=0)
        target = root / str(number)
        for path in paths:
            moved = target / path.relative_to(self.path)
            moved.parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, moved)
        for path in copied or []:
            if path.exists():
                shutil.copy2(path, target / path.relative_to(self.path))
        there = f"{len(paths)} later or damaged entries of {self.path}"
        warnings.warn(f"{there} are in {target} now", stacklevel=4)

    def _rewind_metrics(self, counts: Counts, pretraining: PretrainingState) -> None:
        if not self.metrics.exists():
            return
        lines = self.metrics.read_text(encoding="utf-8").splitlines(keepends=True)
        last = {
            # Without a count, of an earlier version, it is behind.
            "value_pretraining": pretraining.iteration - 1 if pretraining.is_under_way else math.inf,
            "train": counts.iteration,
            "evaluate": counts.evaluated,
            # One that was skipped is due again.
            "skipped_evaluation": counts.iteration - 1,
        }
        kept = [line for line in lines if not _is_later(line, last)]
        temporary = self.metrics.with_suffix(".rewound")
        temporary.write_text("".join(kept), encoding="utf-8")
        os.replace(temporary, self.metrics)


def _is_later(line: str, last: dict[str, float]) -> bool:
    """Whether a line of metrics.jsonl is later than the `last` of its phase, or was cut off by a kill."""
    try:
        entry = json.loads(line)
    except json.JSONDecodeError:
        return True
    return bool(entry.get("iteration", 0) > last.get(entry["phase"], math.inf))
