"""The directory of a training run: settings, metrics, pictures, and the checkpoints that are kept."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from lacfast.checkpoint import TRAINER_STATE
from lacfast.runtime.files import write_json, writing_to

BEST = "best"
_SCORE = "score.json"


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
        """The numbered checkpoints that are complete, oldest first."""
        found = (self.path / "checkpoints").glob("[0-9]*")
        return sorted(path for path in found if (path / TRAINER_STATE).exists())

    def prune(self) -> None:
        """Remove all but the latest checkpoints."""
        for path in self.checkpoints()[: -self.keep_last]:
            shutil.rmtree(path)

    def best_score(self) -> float | None:
        """What the best checkpoint scored; None before there is one."""
        path = self.best / _SCORE
        return float(json.loads(path.read_text(encoding="utf-8"))["score"]) if path.exists() else None

    def write_best_score(self, score: float, iteration: int) -> None:
        write_json(self.best / _SCORE, {"score": score, "iteration": iteration})

    def rewind_metrics(self, iteration: int) -> None:
        """Drop what was logged after the checkpoint that a run goes on from: it will be logged again."""
        if not self.metrics.exists():
            return
        lines = self.metrics.read_text(encoding="utf-8").splitlines(keepends=True)
        kept = [line for line in lines if not _is_later(line, iteration)]
        temporary = self.metrics.with_suffix(".rewound")
        temporary.write_text("".join(kept), encoding="utf-8")
        os.replace(temporary, self.metrics)

    def write_settings(self, settings: dict[str, Any]) -> None:
        write_json(self.path / "run.json", settings)

    def resumed(self, resume: str) -> Path | None:
        """The checkpoint to go on from: "auto" the latest here if any, "never" none, else the path itself.

        Raises:
            ValueError: when "never" would mix a new run into an old one, or the path holds no checkpoint.
        """
        found = self.checkpoints()
        if resume == "auto":
            return found[-1] if found else None
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
        return Path(resume)


def _is_later(line: str, iteration: int) -> bool:
    """Whether a line of metrics.jsonl is of a later iteration, or was cut off by a kill."""
    try:
        entry = json.loads(line)
    except json.JSONDecodeError:
        return True
    return entry["phase"] != "value_pretraining" and int(entry.get("iteration", 0)) > iteration
