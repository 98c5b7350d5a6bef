"""Units of work, one JSON file per study: what is there is not done again, what is begun is left alone.

The study "critics/dit" is the file critics/dit.json, one line per unit. A process writes a unit into a file
of its own below the folder critics/dit and then merges the folder into the study: one that dies in between
loses nothing, since readers look at both.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lacfast.config import to_json

Unit = dict[str, Any]
SETTINGS = "settings"
"""The key under which a study says what its units were worked out with."""


def studies(folder: Path) -> list[Path]:
    """The studies of a folder, without suffix, in the order of their names."""
    return sorted({path.with_suffix("") for path in folder.glob("*.json")} | {*folder.glob("*/")})


def load(study: Path) -> dict[str, Unit]:
    """Key -> unit of all that is finished, in the order of the keys; empty before the first one."""
    # Cells first: one that is merged meanwhile is in the file that is read next.
    cells = {path: _text(path) for path in study.rglob("*.json")}
    found: dict[str, Unit] = json.loads(_text(_file(study)) or "{}")
    found |= {_key(study, path): json.loads(text) for path, text in cells.items() if text is not None}
    return dict(sorted(found.items()))


def measured(folder: Path) -> Iterator[tuple[str, Unit, dict[str, Unit]]]:
    """Name, settings and units of a folder's studies that have a unit besides the settings."""
    for study in studies(folder):
        found = load(study)
        settings = found.pop(SETTINGS, None)
        if settings is not None and found:
            yield study.name, settings, found


def write(study: Path, key: str, unit: Unit) -> None:
    """Keep a unit, whole or not at all."""
    dump(_cell(study, key), json.dumps(unit) + "\n")
    merge(study)


def merge(study: Path) -> None:
    """Put every unit that has a file of its own into the study's file."""
    with _locked(study.parent):
        cells = list(study.rglob("*.json"))
        lines = (f"{json.dumps(key)}: {json.dumps(unit)}" for key, unit in load(study).items())
        dump(_file(study), "{\n" + ",\n".join(lines) + "\n}\n")
        for path in cells:
            path.unlink()


def dump(path: Path, text: str) -> None:
    """Write a file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.partial")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def done(study: Path, key: str, work: Callable[[], Unit]) -> Unit | None:
    """The unit, worked out if it is not there; None while another process works on it."""
    found = load(study).get(key)
    if found is not None:
        return found
    with begun(study, key) as is_ours:
        if not is_ours:
            return None
        # Another process may have finished it between the look and the mark.
        if key not in load(study):
            write(study, key, work())
    return load(study)[key]


@contextmanager
def begun(study: Path, key: str) -> Iterator[bool]:
    """Mark a unit as begun for as long as the block runs; yields False where another process has."""
    is_ours = begin(study, key)
    try:
        yield is_ours
    finally:
        if is_ours:
            mark(study, key).unlink()


def mark(study: Path, key: str) -> Path:
    """The file that says that a process has begun the unit."""
    return _cell(study, key).with_suffix(".begun")


def begin(study: Path, key: str) -> bool:
    """Whether this process is the first to begin the unit; the mark of one that has died is taken over."""
    begun = mark(study, key)
    begun.parent.mkdir(parents=True, exist_ok=True)
    if begun.exists() and not _lives(*begun.read_text(encoding="utf-8").partition(" ")[::2]):
        begun.unlink()
    try:
        with begun.open("x", encoding="utf-8") as file:
            file.write(f"{os.getpid()} {_birth(os.getpid())}")
    except FileExistsError:
        return False
    return True


def _file(study: Path) -> Path:
    return study.with_name(f"{study.name}.json")


def _cell(study: Path, key: str) -> Path:
    return study / f"{key}.json"


def _key(study: Path, cell: Path) -> str:
    return cell.relative_to(study).as_posix().removesuffix(".json")


def _text(path: Path) -> str | None:
    """What a file holds; None without one."""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the folder's lock: two processes that merge at once would lose each other's units."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _lives(process: str, birth: str) -> bool:
    # A mark may come from another machine, or from before a restart: its number may be another process now.
    return Path(f"/proc/{process}").exists() and birth in ("", _birth(int(process)))


def _birth(process: int) -> str:
    """When the process began: which start of which machine, and clock ticks since."""
    ticks = Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rsplit(")", 1)[1].split()[19]
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip() + "/" + ticks


def changed(config: Any) -> dict[str, Any]:
    """The settings of a dataclass that differ from its defaults, as JSON has them.

    An option that is new, at its default, changes nothing of what was measured before there was one.
    """
    found = _different(to_json(config), to_json(type(config)()))
    settings: dict[str, Any] = json.loads(json.dumps(found))
    return settings


def _different(settings: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    return {
        name: _different(value, defaults[name]) if _alike(value, defaults[name]) else value
        for name, value in settings.items()
        if value != defaults[name]
    }


def _alike(value: Any, default: Any) -> bool:
    # The settings of another choice have no defaults here.
    return isinstance(value, dict) and isinstance(default, dict) and value.keys() == default.keys()


def digest(settings: dict[str, Any]) -> str:
    """A short name for settings."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:10]


def require_settings(study: Path, settings: dict[str, Any]) -> None:
    """Say in the study what its units were worked out with, or that they were with these.

    Raises:
        ValueError: when it holds units of other settings.
    """
    wanted, found = json.loads(json.dumps(settings)), load(study).get(SETTINGS)
    if found is None:
        write(study, SETTINGS, wanted)
        return
    different = sorted(name for name in found.keys() | wanted if found.get(name) != wanted.get(name))
    if different:
        raise ValueError(f"{study} is of other settings ({', '.join(different)}); choose another --out")
