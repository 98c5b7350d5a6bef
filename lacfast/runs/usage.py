"""What the command line's parser refuses, in one line: what is wrong, what is near, how it is written."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from lacfast.config.checks import Config, field_types, unknown
from lacfast.config.choice import Choice
from lacfast.runs.recipes import recipes

SHOWN = 4
"""Recipes that are named at most."""
_COLOR = re.compile(r"\x1b\[[0-9;]*m")


def refusal(box: str, arguments: Sequence[str], command: str) -> str:
    """The line for the box that the parser printed.

    Args:
        box: a title, and what it says in parts between rules.
        arguments: of the command line.
        command: that was understood, "lacfast train shapes".
    """
    parts = _parts(box)
    whole = " ".join(" ".join(parts[0]).split())
    remedy = f"see {command} {'--help-all' if command.startswith('lacfast train ') else '--help'}"
    if found := re.match(r"Error parsing (\S+):", whole):
        written = _following(parts, "Argument helptext:")
        given = " ".join(_given(arguments, found[1])) or "that"
        return f"{found[1]} cannot be {given!r}; write {written[0].strip() if written else found[1]}"
    if found := re.match(r"invalid choice '(.*)' for argument '(.*)'\. Expected one of \((.*)\)", whole):
        return str(unknown(found[2], found[1], re.findall(r"'([^']*)'", found[3])))
    if found := re.match(r"Unrecognized [\w ]+: (\S+?),?(?: |$)", whole):
        return _unrecognized(found[1], parts, command, remedy)
    if found := re.match(r"Missing value for argument '(.*?)'", whole):
        return f"{found[1]} needs a value; {remedy}"
    if found := re.match(r"Missing from (.*?):", whole):
        needed = [line.strip() for line in parts[0] if re.match(r" {4}\S", line)]
        return f"{found[1]} needs {', '.join(needed)}; {remedy}"
    if found := re.match(r"Expected one of \{(.*)\}", whole):
        return f"{command} needs one of {found[1]}; {remedy}"
    return f"{whole}; {remedy}"


def _unrecognized(word: str, parts: list[list[str]], command: str, remedy: str) -> str:
    names = re.split(r",\s*", " ".join(line.strip() for line in _following(parts, "Available subcommands:")))
    if names != [""] and not word.startswith("-"):
        return str(unknown("command", f"{command} {word}".removeprefix("lacfast "), _full(command, names)))
    # The parser knows the named recipe alone, since reading all of them for it takes longer than the rest.
    if command.startswith("lacfast train ") and (owners := _recipes_with(word)):
        return f"{command} has no {word}; it is an option of {', '.join(owners[:SHOWN])}"
    near = re.findall(r"^ {4}(--[\w.-]+)", "\n".join(_following(parts, "Perhaps you meant:")), re.MULTILINE)
    if word in near:
        option = rf"^ {{4}}{re.escape(word)}\b(.*?)(?=^ {{4}}\S|\Z)"
        described = re.findall(option, "\n".join(_following(parts, "Perhaps you meant:")), re.M | re.S)
        owners = [owner for text in described for owner in re.findall(r"in (lacfast .*?) --help", text)]
        return f"{command} has no {word}; it is an option of {', '.join(dict.fromkeys(owners))}"
    guess = f"did you mean {near[0]}? Otherwise " if near else ""
    return f"unknown {'option' if word.startswith('-') else 'word'} {word} of {command}; {guess}{remedy}"


def _recipes_with(word: str) -> list[str]:
    """The commands of the recipes that have an option, as those with a LoRA have its rank."""
    if not word.startswith("--"):
        return []
    *path, name = word.removeprefix("--").replace("-", "_").split(".")

    def has(settings: Any) -> bool:
        for part in path:
            settings = getattr(settings, part, None)
        # A choice is one word, whose settings are no options.
        is_split = isinstance(settings, Config) and not isinstance(settings, Choice)
        return is_split and name in field_types(type(settings))

    return [f"lacfast train {known}" for known, recipe in recipes().items() if has(recipe.settings)]


def _full(command: str, names: list[str]) -> list[str]:
    start = command.removeprefix("lacfast").strip()
    return [f"{start} {name}".strip() for name in names]


def _parts(box: str) -> list[list[str]]:
    """The lines between the rules of a box, indented as they are, without title and frame.

    The frame is made of spaces and "-" where the terminal has no lines to draw.
    """
    parts: list[list[str]] = [[]]
    for line in _COLOR.sub("", box).splitlines()[1:]:
        text = line[2:].rstrip(" │╯")
        if re.fullmatch(r"─+|-+", text):
            parts.append([])
        elif text:
            parts[-1].append(text)
    return [part for part in parts if part]


def _following(parts: list[list[str]], title: str) -> list[str]:
    """The lines of the part that starts with a title, without the title; none without that part."""
    for part in parts:
        if part and part[0].startswith(title):
            first = part[0].removeprefix(title)
            return [first, *part[1:]] if first.strip() else part[1:]
    return []


def _given(arguments: Sequence[str], flag: str) -> list[str]:
    """What the arguments say behind a flag."""
    given: list[str] = []
    is_behind = False
    for word in arguments:
        name, equals, value = word.partition("=")
        if word.startswith("--"):
            is_behind = name.replace("_", "-") == flag
            given += [value] if is_behind and equals else []
        elif is_behind:
            given.append(word)
    return given
