"""What the pages share: style, cards, charts and tables of settings."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from importlib import resources
from string import Template
from typing import Any

from lacfast.report.charts import drawings
from lacfast.report.records import Records


def fill(template: str, **values: Any) -> str:
    """A page of this package with its placeholders filled, the shared style in it."""
    files = resources.files("lacfast.report")
    text, style = (files.joinpath(name).read_text(encoding="utf-8") for name in (template, "style.css"))
    return Template(text).substitute(values, style=style)


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def card(name: str, value: str, detail: str, before: str = "") -> str:
    start = f'<span class="from">{before} → </span>' if before else ""
    return (
        f'<div class="card"><div class="name">{name}</div><div class="value">{start}{value}</div>'
        f'<div class="detail">{detail}</div></div>'
    )


def charts(records: Records) -> str:
    """The charts of a run with their captions."""
    cards = [
        f'<div class="chart"><h3>{escape(drawing.title)}</h3><p>{escape(drawing.meaning)}</p>'
        f"{drawing.svg}</div>"
        for drawing in drawings(records)
    ]
    return "\n".join(cards)


def settings_tables(settings: dict[str, Any]) -> Iterable[str]:
    for title, values in settings.items():
        rows = "".join(
            f"<tr><td><code>{escape(name)}</code></td><td><code>{escape(str(value))}</code></td></tr>"
            for name, value in flat(values)
        )
        table = f'<div class="scroll"><table>{rows}</table></div>'
        yield f"<details><summary>{escape(title)}</summary>{table}</details>"


def flat(values: dict[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    """(dotted name, value) of nested settings."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value
