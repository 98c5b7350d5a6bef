"""Settings as JSON and back: what run.json and the descriptions inside checkpoints hold."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from types import SimpleNamespace
from typing import Any, TypeVar, get_args, get_type_hints

from lacfast.config.choice import Choice, variants
from lacfast.config.earlier import today
from lacfast.config.unread import made

T = TypeVar("T")


def to_json(settings: Any) -> Any:
    """Nested dicts of a dataclass; a choice names itself: {"choice": "ratio", "clip_range": 1e-4}."""
    if not is_dataclass(settings):
        return settings
    found = {field.name: to_json(getattr(settings, field.name)) for field in fields(settings)}
    return {"choice": settings.name} | found if isinstance(settings, Choice) else found


def from_json(kind: type[T], stored: dict[str, Any]) -> T:
    """Settings from what `to_json` made, today or before an option was spelled as it is.

    What nothing reads is at its default, whatever an earlier version let a file say.

    Args:
        kind: the dataclass that was stored; options that are missing have their defaults.
        stored: its JSON, where tuples are lists.

    Raises:
        ValueError: for an option that `kind` does not have, or a value out of its range.
    """
    hints = get_type_hints(kind)
    known = [field.name for field in fields(kind)]  # type: ignore[arg-type]
    given = today(kind.__name__, stored)
    unknown = sorted(given.keys() - known)
    if unknown:
        raise ValueError(
            f"{kind.__name__} has no {', '.join(unknown)}; known: {', '.join(known)}. Another version of "
            "lacfast wrote these settings: take the option out of the file, or install that version"
        )
    values = {name: _typed(hints[name], value) for name, value in given.items()}
    return made(kind, values, SimpleNamespace(**values))


def _typed(annotation: Any, value: Any) -> Any:
    """The value as a field of this type holds it."""
    if isinstance(value, list):
        return tuple(_typed(None, entry) for entry in value)
    if not isinstance(value, dict):
        return value
    if "choice" in value:
        known = variants(annotation)
        if value["choice"] not in known:
            raise ValueError(f"unknown choice {value['choice']!r}; known: {', '.join(known)}")
        settings = {name: entry for name, entry in value.items() if name != "choice"}
        return from_json(known[value["choice"]], settings)
    members = (annotation, *get_args(annotation))
    records = [member for member in members if isinstance(member, type) and is_dataclass(member)]
    return from_json(records[0], value) if records else value
