"""The page of a training run: what it learned, step by step, and which signs of failure it shows."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image

from lacfast.report.diagnostics import Finding, findings
from lacfast.report.page import card, charts, fill, settings_tables
from lacfast.report.pictures import png_data_uri, prompts_of
from lacfast.report.progress import Progress, duration, progress, read_run
from lacfast.report.records import Records, average, named, phase, recent

PAGE = "report.html"
SHOWN_PICTURES = 6
"""Grids of images, evenly spaced over the run."""


class NothingYetError(ValueError):
    """A run has no page before its first iteration."""


def write_run_report(directory: Path) -> Path:
    """Write report.html into the directory of a run; returns the page's path.

    Raises:
        ValueError: see render_run.
    """
    page = directory / PAGE
    page.write_text(render_run(directory), encoding="utf-8")
    return page


def render_run(directory: Path) -> str:
    """The page of a run as text.

    Args:
        directory: of `lacfast train` or any trainer with `metrics_path`: metrics.jsonl, and where there are
            any run.json and samples/*.png.

    Raises:
        ValueError: when there are no metrics, or they are a demo's, which has a report of its own.
    """
    records, settings = read_run(directory)
    if (directory / "summary.json").exists():
        raise ValueError(
            f"{directory} holds a demo, whose report.html this one would replace; open that, or give the "
            "directory of a training run"
        )
    return render(
        directory.resolve().name,
        records,
        sorted((directory / "samples").glob("*.png")),
        settings,
    )


def render(name: str, records: Records, pictures: Sequence[Path], settings: dict[str, Any]) -> str:
    """The page as text.

    Args:
        name: of the run.
        records: lines of metrics.jsonl.
        pictures: grids of images, oldest first.
        settings: nested configuration.

    Raises:
        NothingYetError: for a run that has not finished an iteration.
    """
    train, evaluations = phase(records, "train"), phase(records, "evaluate")
    if not train:
        raise NothingYetError(
            "the run has not finished an iteration, so there is nothing to report yet; lacfast watch shows "
            "what it does, and --serve the page as soon as there is one"
        )
    found, prompts = findings(records), _prompts(pictures)
    return fill(
        "run.html",
        name=escape(name),
        iterations=train[-1]["iteration"],
        images=f"{train[-1]['images']:,}",
        headline=escape(headline(evaluations, train)),
        findings="\n".join(_finding(finding) for finding in found) or _NOTHING_FOUND,
        cards="\n".join(_cards(train, evaluations)),
        judged=_CHOSEN_HERE if evaluations else "",
        charts=charts(records),
        pictures="\n".join(_pictures(pictures)),
        same=_SAME if prompts else "",
        prompts=prompts,
        state=escape(_state(progress(records, settings))),
        settings="\n".join(settings_tables({"run.json": settings} if settings else {})),
    )


_CHOSEN_HERE = (
    '<p class="soft">The evaluation prompts also chose the pretrained critic, the best checkpoint and, where '
    "it is set, the early stop, so the best score is a little high. "
    "<code>lacfast evaluate RUN --prompts OTHERS</code> judges it on prompts that chose nothing.</p>"
)
# Other trainers' pictures hold no prompts, and may be of others every time.
_SAME = '<p class="soft">The same prompts and the same noise every time.</p>'
_NOTHING_FOUND = '<p class="soft">None of the known signatures of failure.</p>'


def headline(evaluations: Records, train: Records) -> str:
    """What became of the first trained reward, in one sentence."""
    reward = named(train[-1], "reward")[0]
    if len(evaluations) > 1:
        first, last = (float(record[reward]) for record in (evaluations[0], evaluations[-1]))
        return f"{reward} on evaluation prompts went from {first:.3g} to {last:.3g}"
    start, end = (average(part, f"reward/{reward}") for part in (train[: len(recent(train))], recent(train)))
    return f"{reward} on the run's own images went from {start:.3g} to {end:.3g}; no evaluation compared them"


def _state(found: Progress) -> str:
    """How far the run is; empty where it is done or nothing tells."""
    if found.planned is None or found.is_done:
        return ""
    left = f", {duration(found.seconds_left)} left" if math.isfinite(found.seconds_left) else ""
    return f" of {found.planned:,}{left}"


def _prompts(pictures: Sequence[Path]) -> str:
    """The prompts of the last grid; every evaluation has the same."""
    if not pictures:
        return ""
    with Image.open(pictures[-1]) as picture:
        prompts = prompts_of(picture)
    if not prompts:
        return ""
    rows = "".join(f"<li>{escape(prompt)}</li>" for prompt in prompts)
    return f"<details><summary>Prompts of the images, row by row</summary><ol>{rows}</ol></details>"


def _finding(finding: Finding) -> str:
    return (
        f'<div class="notice"><strong>{escape(finding.title)}</strong> (iteration {finding.iteration}): '
        f"{escape(finding.evidence)}.<br>{escape(finding.remedy)}.</div>"
    )


def _cards(train: Records, evaluations: Records) -> Iterable[str]:
    last = recent(train)
    for reward in named(train[-1], "reward"):
        start = average(train[: len(last)], f"reward/{reward}")
        yield card(
            escape(reward),
            f"{average(last, f'reward/{reward}'):.3g}",
            f"mean of the last {_iterations(len(last))} own images; first: {start:.3g}",
        )
    for name in named(evaluations[-1], "standard_error") if evaluations else []:
        first, final = float(evaluations[0][name]), float(evaluations[-1][name])
        error = float(evaluations[-1].get(f"standard_error/{name}", math.nan))
        yield card(
            f"{escape(name)}, evaluated", f"{final:.3g}", f"± {error:.2g}; {final - first:+.3g} in all"
        )
    if not math.isnan(variance := average(last, "explained_variance")):
        yield card(
            "Critic's explained variance", f"{variance:.2f}", "on each rollout before it learns from it"
        )
    if not math.isnan(distance := average(last, "mean_kl_old")):
        yield card("KL per iteration", f"{distance:.2g}", "per latent element, new from old")
    seconds = average(last, "seconds_rollout"), average(last, "seconds_update")
    yield card(
        "Seconds per iteration", f"{sum(seconds):.3g}", f"{seconds[0]:.3g} rollout, {seconds[1]:.3g} update"
    )


def _iterations(count: int) -> str:
    return "iteration's" if count == 1 else f"{count} iterations'"


def _pictures(pictures: Sequence[Path]) -> Iterable[str]:
    if not pictures:
        yield '<p class="soft">No evaluation has kept any; set eval_every.</p>'
        return
    count = min(len(pictures), SHOWN_PICTURES)
    chosen = sorted({round(index * (len(pictures) - 1) / max(count - 1, 1)) for index in range(count)})
    for index in chosen:
        with Image.open(pictures[index]) as picture:
            source = png_data_uri(picture)
        name = pictures[index].stem
        # A run's own are numbers; a file of another trainer has a name of its own.
        title = escape(f"iteration {int(name)}" if name.isdecimal() else name)
        yield (
            f'<figure><img class="grid" src="{source}" alt="images of {title}">'
            f"<figcaption>{title}</figcaption></figure>"
        )
