"""How far a run is, and how fast: what its files tell while it goes on."""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lacfast.config.checks import require
from lacfast.report.records import Records, average, phase, read_metrics, recent
from lacfast.runtime.directories import LOCK

METRICS = "metrics.jsonl"
SETTINGS = "run.json"
PATIENCE_SECONDS = 600.0
"""Without a line for less than this no run is thought to have ended."""


@dataclass(frozen=True)
class Progress:
    """The state of a run."""

    iteration: int
    """Iterations of training that are done."""
    planned: int | None
    """Iterations that it was asked for. None: no settings lie beside the metrics."""
    images: int
    images_per_second: float
    """Speed of the last iterations, rewards included; NaN before the first."""
    seconds_left: float
    """At the speed of the last iterations, without evaluations; NaN where it cannot be told."""
    iteration_seconds: float
    """Seconds of an iteration, the mean of the last ones; NaN before the first."""
    pretraining: int
    """Iterations of value pretraining that are done."""

    @property
    def is_done(self) -> bool:
        return self.planned is not None and self.iteration >= self.planned


def silence(directory: Path, found: Progress) -> float:
    """Seconds since a run's last line or start, where they are more than a line could need; 0 otherwise.

    An evaluation is given the time of ten iterations, what nothing is known of ten minutes.
    """
    usual = 10 * found.iteration_seconds if math.isfinite(found.iteration_seconds) else 0.0
    now = time.time()
    # Every start writes its lock anew, that of a run that goes on too.
    files = (path for path in (directory / METRICS, directory / LOCK) if path.is_file())
    since = now - max((path.stat().st_mtime for path in files), default=now)
    return since if since > max(usual, PATIENCE_SECONDS) and not found.is_done else 0.0


def read_run(directory: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The lines of a run's metrics.jsonl, [] before the first, and its settings, {} where there are none.

    Raises:
        ValueError: when the directory holds neither metrics nor the lock of a run that has begun, or other
            settings than a run's.
    """
    metrics, settings = directory / METRICS, directory / SETTINGS
    if not metrics.is_file() and not (directory / LOCK).is_file():
        raise ValueError(f"{directory} holds no {METRICS}; give the directory of a training run")
    lines = read_metrics(metrics) if metrics.is_file() else []
    return lines, _settings(settings) if settings.is_file() else {}


def _settings(path: Path) -> dict[str, Any]:
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        require(isinstance(stored, dict), f"holds a {type(stored).__name__}")
    except ValueError as error:
        raise ValueError(
            f"{path} does not hold a run's settings ({error}); take it away, or give another directory"
        ) from error
    return dict(stored)


def progress(records: Records, settings: dict[str, Any]) -> Progress:
    """The progress that lines of a metrics.jsonl and the settings of their run tell."""
    train = phase(records, "train")
    last = recent(train) if train else []
    seconds = average(last, "seconds_rollout") + average(last, "seconds_update")
    images = int(train[-1].get("images", 0)) if train else 0
    iteration = int(train[-1]["iteration"]) if train else 0
    planned = settings.get("train", {}).get("iterations")
    return Progress(
        iteration=iteration,
        planned=None if planned is None else int(planned),
        images=images,
        images_per_second=_per_iteration(train, settings) / seconds if seconds > 0 else math.nan,
        seconds_left=math.nan if planned is None else max(int(planned) - iteration, 0) * seconds,
        iteration_seconds=seconds if seconds > 0 else math.nan,
        pretraining=len(phase(records, "value_pretraining")),
    )


def _per_iteration(train: Records, settings: dict[str, Any]) -> float:
    """Images of one iteration; the log has their sum, which value pretraining began."""
    if "batch_size" in settings.get("train", {}):
        return float(settings["train"]["batch_size"])
    first, last = train[0], train[-1]
    done = int(last["iteration"]) - int(first["iteration"])
    return (int(last.get("images", 0)) - int(first.get("images", 0))) / done if done > 0 else math.nan


def duration(seconds: float) -> str:
    """Seconds in the two largest units: "3 h 20 min"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    parts = [f"{days} d", f"{hours} h", f"{minutes} min", f"{rest} s"]
    counts = (days, hours, minutes, rest)
    first = next((index for index, count in enumerate(counts) if count), 3)
    return " ".join(parts[first : first + 2])
