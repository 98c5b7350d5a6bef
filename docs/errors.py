"""Writes docs/errors.md from the refusals of the tests: python docs/errors.py"""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "errors.md"
HEAD = """# What raises, why, and what to do

To look up a message. Every row is a test that raises it: `python docs/errors.py` collects them.
The command line prints the message alone. It exits with 2 where the settings are wrong, with 1 where the run
failed, with 130 where it was stopped.
"""


class Row(NamedTuple):
    """A part of the message, what leads there, and the part that says what to do."""

    message: str
    cause: str
    remedy: str


def rows(path: Path) -> Iterator[Row]:
    """The refusals of a test file, see tests/refusals.py.

    Raises:
        ValueError: for one whose words are not literal.
    """
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Refusal":
            given = dict(zip(Row._fields, node.args, strict=False))
            given |= {keyword.arg: keyword.value for keyword in node.keywords if keyword.arg in Row._fields}
            try:
                yield Row(**{name: str(ast.literal_eval(word)) for name, word in given.items()})
            except (TypeError, ValueError) as error:
                where = f"{path.relative_to(ROOT)}:{node.lineno}"
                raise ValueError(f"{where}: write message, cause and remedy literally") from error


def _cell(text: str) -> str:
    """Text without what a table or a link is made of."""
    return text.replace("|", "\\|").replace("][", "]\\[")


def page() -> str:
    """The whole page, a table per room."""
    rooms: defaultdict[str, list[Row]] = defaultdict(list)
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        room = path.relative_to(ROOT / "tests").parts[0]
        rooms[room.removeprefix("test_").removesuffix(".py")] += rows(path)
    lines = [HEAD]
    for room, refusals in rooms.items():
        if refusals:
            lines += [f"## {room}", "", "| message | cause | remedy |", "|---|---|---|"]
            lines += [
                "| " + " | ".join(map(_cell, row)).replace("\n", " ") + " |"
                for row in dict.fromkeys(refusals)
            ]
            lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
