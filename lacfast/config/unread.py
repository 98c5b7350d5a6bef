"""Options that nothing reads beside others: refused where set, forgotten where a recipe set them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass, replace
from typing import Any, TypeVar

T = TypeVar("T")


class UnreadError(ValueError):
    """An option was set that nothing reads."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Unread:
    """Options of a config that nothing reads in some context."""

    options: Sequence[str]
    """Fields, one of a part as "ppo.gae_lambda", all of a part as "pretrain"."""
    where: Callable[[Any], bool]
    """Whether the config is of that context."""
    because: Callable[[Any], str]
    """What follows "would be ignored" in the message."""
    remedy: str = ""
    """What to do other than to leave it out. Empty: the defaults are named."""


def readers(
    option: str, choices_of: Mapping[str, Sequence[str]], known: Sequence[str] | None = None
) -> tuple[Unread, ...]:
    """Rules for what only some choices of an option read.

    Args:
        option: the field that names a choice.
        choices_of: other field -> the choices that read it.
        known: choices of which that is known; others read all. None: every choice.
    """

    def rule(name: str, choices: Sequence[str]) -> Unread:
        def unread(settings: Any) -> bool:
            chosen = getattr(settings, option)
            return chosen not in choices and (known is None or chosen in known)

        return Unread(
            options=(name,),
            where=unread,
            because=lambda settings: f" by {option}={getattr(settings, option)!r}",
            remedy=f"use {' and '.join(map(repr, choices))}",
        )

    return tuple(rule(name, choices) for name, choices in choices_of.items())


def require_read(settings: Any, rules: Sequence[Unread]) -> None:
    """
    Raises:
        UnreadError: naming every option that was set and that nothing reads, the reason and the remedy.
    """
    for rule in rules:
        if not rule.where(settings):
            continue
        found = [entry for option in rule.options for entry in _changed(settings, option)]
        if found:
            given = ", ".join(f"{name}={value!r}" for name, value, _ in found)
            defaults = ", ".join(f"{name}={default!r}" for name, _, default in found)
            remedy = f"or {rule.remedy}" if rule.remedy else f"the default is {defaults}"
            raise UnreadError(f"{given} would be ignored{rule.because(settings)}; leave it out, {remedy}")


def variant(base: T, **changes: Any) -> T:
    """`dataclasses.replace`, but what `base` set and nothing reads beside the changes is at its default.

    Raises:
        ValueError: for changes that do not fit, or that nothing reads.
    """
    values = {field.name: getattr(base, field.name) for field in fields(base)}  # type: ignore[arg-type]
    return made(type(base), values | changes, base)


def made(kind: type[T], values: Mapping[str, Any], base: Any) -> T:
    """The config of `values`, where those that are the base's and that nothing reads are at their defaults.

    Args:
        kind: the config's class.
        values: its fields by name; those that are missing are at their defaults.
        base: what has the fields that nobody asked for, or None.

    Raises:
        ValueError: for values that do not fit, or that nothing reads and that are not the base's.
    """
    try:
        return kind(**values)
    except UnreadError:
        settings = _unchecked(kind, values)
    rules: Sequence[Unread] = kind.UNREAD  # type: ignore[attr-defined]
    forgotten: dict[str, Any] = {}
    for rule in rules:
        for option in rule.options if rule.where(settings) else ():
            for name, value, default in _changed(settings, option):
                if _value(base, name) == value:
                    _insert(forgotten, name, default)
    return kind(**dict(values) | _reset(settings, forgotten))


def _unchecked(kind: type[T], values: Mapping[str, Any]) -> T:
    """A config as rules read it, which may not be made of these values."""
    settings = object.__new__(kind)
    for field in fields(kind):  # type: ignore[arg-type]
        value = values[field.name] if field.name in values else _default(kind, field.name)
        object.__setattr__(settings, field.name, value)
    return settings


def _default(kind: type, name: str) -> Any:
    return _defaults(kind)[name]


@functools.cache
def _defaults(kind: type) -> dict[str, Any]:
    """Field -> its default, one object for all configs, which are frozen."""
    return {
        field.name: field.default if field.default_factory is MISSING else field.default_factory()
        for field in fields(kind)
    }


def _changed(
    settings: Any, option: str, prefix: str = "", defaults: Any = None
) -> Iterator[tuple[str, Any, Any]]:
    """(dotted name, value, default) of all within an option that is not at its default.

    `defaults` is the part that its owner has by default. None: the class's own.
    """
    name, _, rest = option.partition(".")
    value = getattr(settings, name)
    default = _default(type(settings), name) if defaults is None else getattr(defaults, name)
    if rest:
        yield from _changed(value, rest, f"{prefix}{name}.", default)
    elif is_dataclass(default) and type(value) is type(default):
        for field in fields(value):
            yield from _changed(value, field.name, f"{prefix}{name}.", default)
    elif value != default:
        yield prefix + name, value, default


def _value(settings: Any, dotted: str) -> Any:
    for name in dotted.split("."):
        settings = getattr(settings, name, None)
    return settings


def _insert(tree: dict[str, Any], dotted: str, default: Any) -> None:
    *parts, name = dotted.split(".")
    for part in parts:
        tree = tree.setdefault(part, {})
    tree[name] = default


def _reset(settings: Any, tree: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of `settings` that the tree changes, a part with all its changes at once."""
    return {
        name: replace(getattr(settings, name), **_reset(getattr(settings, name), entry))
        if isinstance(entry, dict)
        else entry
        for name, entry in tree.items()
    }
