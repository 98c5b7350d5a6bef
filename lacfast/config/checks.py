"""What settings may be: annotations of a dataclass say types and ranges, and are checked when one is made."""

from __future__ import annotations

import difflib
import functools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from types import NoneType, UnionType
from typing import (
    Annotated,
    Any,
    ClassVar,
    Literal,
    Self,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

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


_Checker = Callable[[str, Any], None]
"""Check of a field's name and its value."""
_Made = TypeVar("_Made")


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
    kind: type = type(settings)
    for name, check in _checkers(kind).items():
        check(name, getattr(settings, name))


def field_types(kind: type) -> dict[str, Any]:
    """Field -> its type with all that is annotated, in the order of the fields."""
    return _field_types(kind)


@functools.cache
def _field_types(kind: type) -> dict[str, Any]:
    hints = get_type_hints(kind, include_extras=True)
    return {field.name: hints[field.name] for field in fields(kind)}


@functools.cache
def _checkers(kind: type) -> dict[str, _Checker]:
    """Field -> what checks it; thousands of settings are made of the same few classes."""
    return {name: _checker(annotation) for name, annotation in field_types(kind).items()}


def _checker(annotation: Any) -> _Checker:
    """What raises a ValueError for a value that an annotation does not allow."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        plain, rules = _checker(arguments[0]), arguments[1:]

        def check_annotated(name: str, value: Any) -> None:
            plain(name, value)
            for rule in rules:
                _check_rule(name, value, rule)

        return check_annotated
    fits = _fitter(annotation)
    if origin in (Union, UnionType):
        members = [(_fitter(member), _checker(member)) for member in arguments]

        def check_inside(name: str, value: Any) -> None:
            next(check for fits_member, check in members if fits_member(value))(name, value)

    elif origin is tuple:
        entries = _repeated(arguments, _checker)

        def check_inside(name: str, value: Any) -> None:
            for index, (entry, check) in enumerate(zip(value, entries(len(value)), strict=True)):
                check(f"{name}[{index}]", entry)

    else:

        def check_inside(name: str, value: Any) -> None: ...

    def check(name: str, value: Any) -> None:
        if not fits(value):
            raise ValueError(f"{name}={value!r} must be {_described(annotation)}")
        check_inside(name, value)

    return check


def _check_rule(name: str, value: Any, rule: Any) -> None:
    if isinstance(rule, Range):
        if value not in rule:
            raise ValueError(f"{name}={value!r} must {rule}")
    elif isinstance(rule, OneOf) and value not in tuple(rule.names):
        raise unknown(rule.what or name, value, rule.names)


def _repeated(arguments: tuple[Any, ...], made: Callable[[Any], _Made]) -> Callable[[int], list[_Made]]:
    """Length -> what is made of the types of a tuple's entries; `tuple[int, ...]` has as many as it takes."""
    if arguments[-1:] == (Ellipsis,):
        one = made(arguments[0])
        return lambda length: [one] * length
    each = [made(argument) for argument in arguments]
    return lambda length: each


def _fitter(annotation: Any) -> Callable[[Any], bool]:
    """Whether a value is of the type, whatever its range. An int is a float; True is no number."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _fitter(arguments[0])
    if origin in (Union, UnionType):
        members = [_fitter(member) for member in arguments]
        return lambda value: any(fits(value) for fits in members)
    if origin is Literal:
        return lambda value: value in arguments
    if origin is tuple:
        entries = _repeated(arguments, _fitter)

        def fits_tuple(value: Any) -> bool:
            if not isinstance(value, tuple):
                return False
            each = entries(len(value))
            return len(value) == len(each) and all(
                fits(entry) for fits, entry in zip(each, value, strict=True)
            )

        return fits_tuple
    if annotation in (int, float):
        return lambda value: isinstance(value, (int, annotation)) and not isinstance(value, bool)
    kind = origin or annotation
    return lambda value: not isinstance(kind, type) or isinstance(value, kind)


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
