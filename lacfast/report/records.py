"""What the lines of a metrics.jsonl hold: phases, names, and means of numbers that may be missing."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

Record = Mapping[str, Any]
"""One line."""
Records = Sequence[Record]


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file, without a last one that a kill or a full disk cut.

    Raises:
        ValueError: for any other line that is no entry, by its number.
    """
    *whole, _cut = path.read_text(encoding="utf-8", errors="replace").split("\n")
    return [_entry(line, f"{path}:{number}") for number, line in enumerate(whole, start=1)]


def _entry(line: str, place: str) -> dict[str, Any]:
    try:
        entry = json.loads(line)
        entry["phase"], entry["iteration"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{place} is no entry of a run's log: {line[:60]!r}; remove the line, or give another directory"
        ) from error
    return dict(entry)


def phase(records: Records, name: str) -> list[Record]:
    """The lines of one phase: "train", "evaluate" or "value_pretraining"; skipped iterations are left out."""
    return [record for record in records if record["phase"] == name and not record.get("skipped")]


def named(record: Record, prefix: str) -> list[str]:
    """What a line has under "prefix/": rewards, standard errors, calibrations."""
    return [name.removeprefix(f"{prefix}/") for name in record if name.startswith(f"{prefix}/")]


def recent(records: Records) -> Records:
    """The last quarter of the iterations, at least one."""
    return records[-max(len(records) // 4, 1) :]


def average(records: Records, name: str) -> float:
    """Mean of a metric, over its steps too; NaN where no record has it."""
    values = [
        float(value)
        for record in records
        for value in _flat(record.get(name))
        if value is not None and math.isfinite(value)
    ]
    return fmean(values) if values else math.nan


def _flat(value: Any) -> Iterator[Any]:
    if isinstance(value, list):
        for each in value:
            yield from _flat(each)
    else:
        yield value
