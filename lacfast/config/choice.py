"""One option of several that exclude each other: a record with its own settings, and the word for it."""

from __future__ import annotations

import re
from dataclasses import MISSING, fields
from types import UnionType
from typing import Any, ClassVar, Union, get_args, get_origin

from lacfast.config.checks import Config, unknown


class Choice(Config):
    """Base of the records of which a field holds one, as in `clip: Ratio | Nats | KLMask`.

    Its word, in messages and on the command line, is its name and its settings, in order or by name, where
    low..high is a pair: "ratio:1e-4", "ratio:1e-4..2e-4", "sliding:4,every=25".
    """

    name: ClassVar[str]
    """Its name in JSON, words and checkpoints: the class's in lower case, "kl_mask", or a given one."""

    def __init_subclass__(cls, name: str = "") -> None:
        spaced = re.sub(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", cls.__name__)
        cls.name = name or spaced.lower()

    def __str__(self) -> str:
        values = [(field, getattr(self, field.name)) for field in fields(self)]  # type: ignore[arg-type]
        given = [
            _text(value) if field.default is MISSING else f"{field.name}={_text(value)}"
            for field, value in values
            if value != field.default
        ]
        return self.name + ":" * bool(given) + ",".join(given)


def variants(annotation: Any) -> dict[str, type[Choice]]:
    """The choices among the types of a field, by name."""
    members = get_args(annotation) if get_origin(annotation) in (UnionType, Union) else (annotation,)
    return {member.name: member for member in members if _is_choice(member)}


def usage(known: dict[str, type[Choice]]) -> str:
    """How the word of each choice is written: "ratio:CLIP_RANGE|nats:CLIP_NATS"."""
    words = []
    for name, variant in known.items():
        required = [field.name.upper() for field in fields(variant) if field.default is MISSING]  # type: ignore[arg-type]
        words.append(name + ":" * bool(required) + ",".join(required))
    return "|".join(words)


def parse(word: str, known: dict[str, type[Choice]]) -> Choice:
    """The choice of a word.

    Raises:
        ValueError: for an unknown name or setting, or a value out of its range.
    """
    name, _, settings = word.partition(":")
    if name not in known:
        raise unknown("choice", name, known, f"Write {usage(known)}")
    given: list[Any] = []
    named: dict[str, Any] = {}
    for setting in filter(None, settings.split(",")):
        key, equals, value = setting.rpartition("=")
        if equals:
            named[key] = _value(value)
        else:
            given.append(_value(value))
    try:
        return known[name](*given, **named)
    except TypeError as error:
        settings = ", ".join(field.name for field in fields(known[name]))  # type: ignore[arg-type]
        example = usage({name: known[name]})
        raise ValueError(
            f"{word!r} does not fit {name}, whose settings are {settings or 'none'}; write {example}"
        ) from error


def _is_choice(member: Any) -> bool:
    return isinstance(member, type) and issubclass(member, Choice)


def _text(value: Any) -> str:
    return "..".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _value(text: str) -> Any:
    if ".." in text:
        return tuple(map(_value, text.split("..", 1)))
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
