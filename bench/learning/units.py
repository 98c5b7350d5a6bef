"""Units of work as JSON files: what is there is not done again, what a process has begun is left to it."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any


def write(path: Path, content: dict[str, Any]) -> None:
    """Keep a result, whole or not at all, in one line: scores per image would make a thousand."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".partial")
    temporary.write_text(json.dumps(content) + "\n", encoding="utf-8")
    temporary.replace(path)


def read(path: Path) -> dict[str, Any]:
    """What `write` kept."""
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def done(path: Path, work: Callable[[], dict[str, Any]]) -> dict[str, Any] | None:
    """The unit's result, worked out if it is not there; None while another process works on it."""
    if path.exists():
        return read(path)
    if not begin(path):
        return None
    try:
        # Another process may have finished it between the look and the mark.
        if not path.exists():
            write(path, work())
    finally:
        mark(path).unlink()
    return read(path)


def mark(path: Path) -> Path:
    """The file that says that a process has begun the unit."""
    return path.with_suffix(".begun")


def begin(path: Path) -> bool:
    """Whether this process is the first to begin the unit; the mark of one that has died is taken over."""
    path.parent.mkdir(parents=True, exist_ok=True)
    begun = mark(path)
    if begun.exists() and not _lives(*begun.read_text(encoding="utf-8").partition(" ")[::2]):
        begun.unlink()
    try:
        with begun.open("x", encoding="utf-8") as file:
            file.write(f"{os.getpid()} {_birth(os.getpid())}")
    except FileExistsError:
        return False
    return True


def _lives(process: str, birth: str) -> bool:
    # A mark may come from another machine, or from before a restart: its number may be another process now.
    return Path(f"/proc/{process}").exists() and birth in ("", _birth(int(process)))


def _birth(process: int) -> str:
    """Of which start of which machine the process is, in clock ticks."""
    ticks = Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rsplit(")", 1)[1].split()[19]
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip() + "/" + ticks


def changed(config: Any) -> dict[str, Any]:
    """The settings of a dataclass that differ from its defaults, as JSON has them.

    An option that is new, at its default, changes nothing of what was measured before there was one.
    """
    found = _different(asdict(config), asdict(type(config)()))
    settings: dict[str, Any] = json.loads(json.dumps(found))
    return settings


def _different(settings: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    return {
        name: _different(value, defaults[name])
        if isinstance(value, dict) and isinstance(defaults[name], dict)
        else value
        for name, value in settings.items()
        if value != defaults[name]
    }


def digest(settings: dict[str, Any]) -> str:
    """A short name for settings."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:10]


def require_settings(directory: Path, settings: dict[str, Any]) -> None:
    """Say in the directory what its units were worked out with, or that they were with these.

    Raises:
        ValueError: when it holds units of other settings.
    """
    path, wanted = directory / "settings.json", json.loads(json.dumps(settings))
    if not path.exists():
        write(path, wanted)
        return
    found = read(path)
    different = sorted(name for name in found.keys() | wanted if found.get(name) != wanted.get(name))
    if different:
        raise ValueError(f"{directory} is of other settings ({', '.join(different)}); choose another --out")
