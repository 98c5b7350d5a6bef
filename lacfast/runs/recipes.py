"""Recipes: files of settings that `lacfast train` starts from; the package's, one's own, a run's."""

from __future__ import annotations

import functools
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

import lacfast
from lacfast.config import from_json
from lacfast.config.checks import unknown
from lacfast.runs.config import RunConfig

SUFFIXES = (".yaml", ".yml", ".json")
"""Endings of files that hold settings; JSON is what a run wrote."""


@dataclass(frozen=True)
class Recipe:
    """Settings of a run, and what they are for."""

    summary: str
    """The first line of the file's comment, or else its path."""
    settings: RunConfig


def is_file(word: str) -> bool:
    """Whether a word names a file of settings rather than a recipe of the package."""
    return word.endswith(SUFFIXES)


@functools.cache
def directory() -> Path:
    """Where the recipes of the package lie: inside it in a wheel, beside it in a checkout."""
    package = Path(lacfast.__file__).parent
    return next(path for path in (package / "recipes", package.parent / "recipes") if path.is_dir())


@functools.cache
def recipes() -> dict[str, Recipe]:
    """The recipes of the package by name, those without downloads first."""
    found = {name: load_recipe(directory() / f"{name}.yaml") for name in recipe_names()}
    return dict(sorted(found.items(), key=lambda entry: "without downloads" not in entry[1].summary))


def recipe(source: str) -> RunConfig:
    """The settings of a recipe; its `train` is what a trainer of your own takes.

    Args:
        source: a name of docs/training.md, e.g. "sd35m-pickscore", or a file's path.

    Raises:
        ValueError: for an unknown name, or a file that load_recipe refuses.
    """
    return find_recipe(source).settings


def find_recipe(source: str) -> Recipe:
    """A recipe of the package by its name, or that of a file.

    Raises:
        ValueError: for an unknown name, or see load_recipe.
    """
    if is_file(source):
        return load_recipe(Path(source))
    if source not in recipe_names():
        raise unknown("recipe", source, recipe_names(), f"A file of your own ends in {' or '.join(SUFFIXES)}")
    return load_recipe(directory() / f"{source}.yaml")


def load_recipe(path: Path) -> Recipe:
    """The recipe of a file; options that it does not name have their defaults.

    YAML is read as YAML 1.2 has it, so 1e-4 is a number and "off" a word. Options that exclude each other are
    one word with its settings, as on the command line: `clip: ratio:1e-4`.

    Args:
        path: .yaml or .yml; .json as a run writes it, in which an earlier version may have spelled options
            otherwise, and left some that nothing reads.

    Raises:
        ValueError: for a file that is not there or cannot be read, an unknown option, a value out of its
            range, or, in YAML, an option that nothing reads beside the others.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(
            f"cannot read the recipe {str(path)!r}: {reason}; known by name: {', '.join(recipe_names())}"
        ) from error
    is_stored = path.suffix == ".json"
    try:
        settings = json.loads(text) if is_stored else _Loader(text).get_single_data()
        if not isinstance(settings, dict):
            raise ValueError(f"holds {_kind(settings)}, not settings by name; write `model: ...` and so on")
        found = from_json(RunConfig, settings, forgets=is_stored)
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{path}: {' '.join(str(error).split())}") from error
    return Recipe(_summary(text) or str(path), found)


def recipe_names() -> list[str]:
    """The names of the package's recipes, none of which is read."""
    return sorted(path.stem for path in directory().glob("*.yaml"))


def _kind(value: Any) -> str:
    return "nothing" if value is None else f"a {type(value).__name__}"


def _summary(text: str) -> str:
    first = text.partition("\n")[0]
    return first.removeprefix("#").strip() if first.startswith("#") else ""


def _integer(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    """Digits are decimal; YAML 1.1 would read 010 as 8."""
    digits = str(loader.construct_scalar(node))
    return int(digits, 0) if digits[:2] in ("0o", "0x") else int(digits)


class _Loader(yaml.SafeLoader):
    """Plain values as in YAML 1.2's core schema, and no key twice."""

    # Those of YAML 1.1 make "off" and "no" False and 1e-4 a word.
    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 - the base class's attribute

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = [self.construct_object(key, deep=True) for key, _ in node.value]
        for index, name in enumerate(names):
            if not isinstance(name, str):
                raise ValueError(f"{name!r} is no name of an option; line {node.start_mark.line + 1}")
            if name in names[:index]:
                raise ValueError(f"{name!r} stands twice; line {node.value[index][0].start_mark.line + 1}")
        return super().construct_mapping(node, deep=deep)


for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    (
        "float",
        r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        list("-+0123456789."),
    ),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), _first)
_Loader.add_constructor("tag:yaml.org,2002:int", _integer)
