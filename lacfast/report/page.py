"""What the pages share: style, cards, tables of settings, and reading metrics.jsonl."""

from __future__ import annotations

import json
from collections.abc import Iterable
from html import escape
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any


def fill(template: str, **values: Any) -> str:
    """A page of this package with its placeholders filled, the shared style in it."""
    files = resources.files("lacfast.report")
    text, style = (files.joinpath(name).read_text(encoding="utf-8") for name in (template, "style.css"))
    return Template(text).substitute(values, style=style)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def card(name: str, value: str, detail: str, before: str = "") -> str:
    start = f'<span class="from">{before} → </span>' if before else ""
    return (
        f'<div class="card"><div class="name">{name}</div><div class="value">{start}{value}</div>'
        f'<div class="detail">{detail}</div></div>'
    )


def settings_tables(settings: dict[str, Any]) -> Iterable[str]:
    for title, values in settings.items():
        rows = "".join(
            f"<tr><td><code>{escape(name)}</code></td><td><code>{escape(str(value))}</code></td></tr>"
            for name, value in _flat(values)
        )
        table = f'<div class="scroll"><table>{rows}</table></div>'
        yield f"<details><summary>{escape(title)}</summary>{table}</details>"


def _flat(values: dict[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value
