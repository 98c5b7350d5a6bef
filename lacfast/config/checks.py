"""What settings may be: annotations of a dataclass say types and ranges, and are checked when one is made."""

from __future__ import annotations

import difflib
import functools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from types import NoneType, UnionType
from typing import Annotated, Any, ClassVar, Literal, Self, Union, get_args, get_origin, get_type_hints

from lacfast.config import earlier
from lacfast.config.unread import Unread, require_read


def require(condition: bool, message: str) -> None:
    """
    Raises:
        ValueError: with the message, unless the condition holds.
    """
    if not condition:
        raise ValueError(message)


def unknown(what: str, name: object, known: Iterable[str], remedy: str = "") -> ValueError:
    """The error for a name that is none of the known ones, with those that are spelled nearly so."""
    names = list(known)
    near = difflib.get_close_matches(str(name), names, n=1)
    guess = f"did you mean {near[0]!r}? Known" if near else "known"
    return ValueError(f"unknown {what} {name!r}; {guess}: {', '.join(names)}{remedy and '. ' + remedy}")


@dataclass(frozen=True, kw_only=True)
class Range:
    """The range of a number, as in `Annotated[float, Range(above=0)]`. NaN is in none."""

    least: float = -math.inf
    """Smallest value, itself included."""
    above: float = -math.inf
    """Values are larger than this."""
    most: float = math.inf
    """Largest value, itself included."""
    below: float = math.inf
    """Values are smaller than this."""
    off: float | None = None
    """The infinity that turns the option off. None: values are finite."""

    def __contains__(self, value: float) -> bool:
        if math.isinf(value):
            return value == self.off
        return self.least <= value <= self.most and self.above < value < self.below

    def __str__(self) -> str:
        """What a value must do: "be >= 1", "lie in [0, 1)"."""
        off = "" if self.off is None else f" ({self.off}: off)"
        low = f"[{self.least}" if self.least > -math.inf else f"({self.above}"
        high = f"{self.most}]" if self.most < math.inf else f"{self.below})"
        bounds = (max(self.least, self.above), min(self.most, self.below))
        if all(map(math.isfinite, bounds)):
            equal = self.least == self.most
            return f"be {self.least}{off}" if equal else f"lie in {low}, {high}{off}"
        if math.isfinite(bounds[0]):
            return f"be {'>=' if self.least > -math.inf else '>'} {bounds[0]}{off}"
        if math.isfinite(bounds[1]):
            return f"be {'<=' if self.most < math.inf else '<'} {bounds[1]}{off}"
        return f"be finite{off}"


# Hashed by identity, as tyro hashes annotations and a registry has no hash.
@dataclass(frozen=True, eq=False)
class OneOf:
    """The words that an option knows, as in `Annotated[str, OneOf(RATIOS)]`."""

    names: Iterable[str]
    """All of them; a registry is read when a value is checked."""
    what: str = ""
    """What they are names of, for messages. Empty: the option's name."""


Finite = Annotated[float, Range()]
Positive = Annotated[float, Range(above=0)]
NonNegative = Annotated[float, Range(least=0)]
Bound = Annotated[float, Range(above=0, off=math.inf)]
"""A bound on something, inf where there is none."""
Share = Annotated[float, Range(least=0, most=1)]
Count = Annotated[int, Range(least=1)]
CountOrNone = Annotated[int, Range(least=0)]
"""A count of which 0 has a meaning of its own."""
Seed = Annotated[int, Range(least=0, most=2**62)]
"""Seeds derived from it are taken modulo 2^63, see lacfast.seeds."""


class Config:
    """Base of all settings: frozen dataclasses whose values are checked against their annotations."""

    UNREAD: ClassVar[Sequence[Unread]] = ()
    """Options that nothing reads in some context, where they must be at their defaults."""

    # Named as a dataclass's own constructor takes them, which type checkers see in its place.
    def __new__(cls, *values: Any, **options: Any) -> Self:
        for name in options.keys() - field_types(cls).keys():
            raise _unknown_option(cls, name, options[name])
        return super().__new__(cls)

    def __post_init__(self) -> None:
        check_fields(self)
        require_read(self, self.UNREAD)


def _unknown_option(kind: type, name: str, value: Any) -> TypeError:
    """The error for an option that a config does not have: how it is spelled today, or one that is near."""
    today = earlier.today(kind.__name__, {name: value})
    near = difflib.get_close_matches(name, field_types(kind), n=1)
    if today and name not in today:
        words = ", ".join(f"{key}={_spelled(kind, key, setting)}" for key, setting in today.items())
        remedy = f"write {kind.__name__}({words})"
    elif near:
        remedy = f"did you mean {near[0]!r}?"
    else:
        remedy = f"known: {', '.join(field_types(kind))}"
    return TypeError(f"{kind.__name__} has no option {name!r}; {remedy}")


def _spelled(kind: type, name: str, setting: Any) -> str:
    """A setting in Python, where files have a choice as {"choice": its name, ...}."""
    if not isinstance(setting, dict):
        return repr(setting)
    members = {getattr(member, "name", ""): member for member in get_args(field_types(kind)[name])}
    given = {key: value for key, value in setting.items() if key != "choice" and value is not None}
    words = ", ".join(f"{key}={value!r}" for key, value in given.items())
    return f"{members[setting['choice']].__name__}({words})"


def check_fields(settings: Any) -> None:
    """Check every field of a dataclass against its annotation.

    Raises:
        ValueError: a value of another type, a number out of its range or not finite, an unknown word.
    """
    for name, annotation in field_types(type(settings)).items():
        _check(name, getattr(settings, name), annotation)


def field_types(kind: type) -> dict[str, Any]:
    """Field -> its type with all that is annotated, in the order of the fields."""
    return _field_types(kind)


@functools.cache
def _field_types(kind: type) -> dict[str, Any]:
    hints = get_type_hints(kind, include_extras=True)
    return {field.name: hints[field.name] for field in fields(kind)}


def _check(name: str, value: Any, annotation: Any) -> None:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        _check(name, value, arguments[0])
        for rule in arguments[1:]:
            _check_rule(name, value, rule)
    elif not _fits(value, annotation):
        raise ValueError(f"{name}={value!r} must be {_described(annotation)}")
    elif origin in (Union, UnionType):
        _check(name, value, next(member for member in arguments if _fits(value, member)))
    elif origin is tuple:
        for index, (entry, member) in enumerate(zip(value, _members(arguments, len(value)), strict=True)):
            _check(f"{name}[{index}]", entry, member)


def _check_rule(name: str, value: Any, rule: Any) -> None:
    if isinstance(rule, Range):
        if value not in rule:
            raise ValueError(f"{name}={value!r} must {rule}")
    elif isinstance(rule, OneOf) and value not in tuple(rule.names):
        raise unknown(rule.what or name, value, rule.names)


def _members(arguments: tuple[Any, ...], length: int) -> tuple[Any, ...]:
    """The types of a tuple's entries; `tuple[int, ...]` has as many as it takes."""
    return arguments[:1] * length if arguments[-1:] == (Ellipsis,) else arguments


def _fits(value: Any, annotation: Any) -> bool:
    """Whether a value is of the type, whatever its range. An int is a float; True is no number."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _fits(value, arguments[0])
    if origin in (Union, UnionType):
        return any(_fits(value, member) for member in arguments)
    if origin is Literal:
        return value in arguments
    if origin is tuple:
        members = _members(arguments, len(value)) if isinstance(value, tuple) else ()
        return isinstance(value, tuple) and len(value) == len(members) and all(map(_fits, value, members))
    if annotation in (int, float):
        return isinstance(value, (int, annotation)) and not isinstance(value, bool)
    kind = origin or annotation
    return not isinstance(kind, type) or isinstance(value, kind)


def _described(annotation: Any) -> str:
    """A type in words: "a number", "a pair (a whole number, a whole number) or None"."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _described(arguments[0])
    if origin in (Union, UnionType):
        return " or ".join(dict.fromkeys(map(_described, arguments)))
    if origin is Literal:
        return "one of " + ", ".join(map(repr, arguments))
    if origin is tuple:
        entries = ", ".join("..." if member is Ellipsis else _described(member) for member in arguments)
        return f"a tuple ({entries})"
    words: dict[Any, str] = {
        int: "a whole number", float: "a number", bool: "True or False", str: "text", NoneType: "None"
    }  # fmt: skip
    return words.get(annotation, f"a {getattr(origin or annotation, '__name__', annotation)}")
