"""Settings as JSON and back: what run.json, recipes and the descriptions inside checkpoints hold."""

from __future__ import annotations

from dataclasses import MISSING, fields, is_dataclass
from types import SimpleNamespace
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from lacfast.config.checks import unknown
from lacfast.config.choice import Choice, parse, variants
from lacfast.config.earlier import today
from lacfast.config.unread import made

T = TypeVar("T")


def to_json(settings: Any) -> Any:
    """Nested dicts of a dataclass; a choice names itself: {"choice": "ratio", "clip_range": 1e-4}."""
    if not is_dataclass(settings):
        return settings
    found = {field.name: to_json(getattr(settings, field.name)) for field in fields(settings)}
    return {"choice": settings.name} | found if isinstance(settings, Choice) else found


def from_json(kind: type[T], stored: dict[str, Any], *, forgets: bool = True) -> T:
    """Settings from what `to_json` made, today or by an earlier version, or what people write.

    Args:
        kind: the dataclass that was stored; options that are missing have their defaults.
        stored: its JSON, where tuples are lists. A choice may be its word, "ratio:1e-4", and pairs a dict.
        forgets: an earlier version may have written it: its spellings are read, and what nothing reads is at
            its default. False: both are refused.

    Raises:
        ValueError: for an option that `kind` does not have, one without a default that is missing, or a value
            out of its range.
    """
    hints = get_type_hints(kind)
    known = [field.name for field in fields(kind)]  # type: ignore[arg-type]
    given = today(kind.__name__, stored) if forgets else stored
    for name in given:
        if name not in known:
            raise unknown(
                f"option of {kind.__name__}",
                name,
                known,
                "Take it out of the file, or install the version of lacfast that wrote it",
            )
    missing = [name for name in _without_default(kind) if name not in given]
    if missing:
        raise ValueError(f"{kind.__name__} needs {', '.join(missing)}, and nothing says them; write them")
    values = {name: _typed(hints[name], value, forgets) for name, value in given.items()}
    return made(kind, values, SimpleNamespace(**values)) if forgets else kind(**values)


def _without_default(kind: type) -> list[str]:
    """The options that every file must say."""
    return [
        field.name for field in fields(kind) if field.default is MISSING and field.default_factory is MISSING
    ]


def _typed(annotation: Any, value: Any, forgets: bool) -> Any:
    """The value as a field of this type holds it."""
    if isinstance(value, list):
        return tuple(_typed(None, entry, forgets) for entry in value)
    choices = variants(annotation)
    if isinstance(value, str) and choices:
        return parse(value, choices)
    if not isinstance(value, dict):
        return value
    if "choice" in value:
        if value["choice"] not in tuple(choices):
            raise unknown("choice", value["choice"], choices)
        settings = {name: entry for name, entry in value.items() if name != "choice"}
        return from_json(choices[value["choice"]], settings, forgets=forgets)
    if get_origin(annotation) is tuple:
        return tuple(value.items())
    members = (annotation, *get_args(annotation))
    records = [member for member in members if isinstance(member, type) and is_dataclass(member)]
    return from_json(records[0], value, forgets=forgets) if records else value
