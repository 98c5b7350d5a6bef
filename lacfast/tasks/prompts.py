"""The prompts of the shapes task: vocabulary and metadata.

`kind` is one of KINDS; `objects` lists the (colour, shape) of every object of the image. For `left_of` and
`above` the first one is on the left, or on top.
"""

from __future__ import annotations

from itertools import combinations, permutations

from lacfast.tasks.task import Prompt

COLOURS = ("red", "green", "blue", "yellow")
SHAPES = ("circle", "square", "triangle")
NUMBERS = ("one", "two", "three", "four")
KINDS = ("count", "both", "left_of", "above")
RELATION_WORDS = {"both": "and", "left_of": "left of", "above": "above"}

Thing = tuple[str, str]
"""(colour, shape) of one object."""


def _count_prompt(number: int, thing: Thing) -> Prompt:
    colour, shape = thing
    plural = "" if number == 1 else "s"
    text = f"{NUMBERS[number - 1]} {colour} {shape}{plural}"
    return Prompt(text, {"kind": "count", "objects": [thing] * number})


def _pair_prompt(kind: str, first: Thing, second: Thing) -> Prompt:
    text = f"a {first[0]} {first[1]} {RELATION_WORDS[kind]} a {second[0]} {second[1]}"
    return Prompt(text, {"kind": kind, "objects": [first, second]})


def all_prompts() -> list[Prompt]:
    """All 306 prompts: 48 counts, 66 pairs, 96 left-of and 96 above (ordered, two different shapes)."""
    things: list[Thing] = [(colour, shape) for colour in COLOURS for shape in SHAPES]
    prompts = [_count_prompt(number, thing) for number in range(1, len(NUMBERS) + 1) for thing in things]
    prompts += [_pair_prompt("both", first, second) for first, second in combinations(things, 2)]
    ordered = [(first, second) for first, second in permutations(things, 2) if first[1] != second[1]]
    for kind in ("left_of", "above"):
        prompts += [_pair_prompt(kind, first, second) for first, second in ordered]
    return prompts
