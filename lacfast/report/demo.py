"""The report of a demo run: one self-contained HTML page that a phone can read."""

from __future__ import annotations

import math
from collections.abc import Iterable
from html import escape
from pathlib import Path
from typing import Any

from lacfast.report.page import card, charts, fill, percent, settings_tables
from lacfast.report.pictures import Gallery, png_data_uri, to_image
from lacfast.report.records import read_metrics

PHASES = {
    "pretraining": "Pretraining the base model",
    "evaluation": "Evaluation, before and after",
    "value_pretraining": "Value pretraining",
    "training": "Reinforcement learning",
    "steering": "Steering, before and after",
    "saving": "Saving and loading again",
    "report": "Pictures and report",
}
BACKBONES = {"dit": "tiny SD3 transformer", "unet": "tiny Stable Diffusion UNet"}


def write_report(
    directory: Path, summary: dict[str, Any], gallery: Gallery, settings: dict[str, Any]
) -> Path:
    """Write report.html for a run.

    Args:
        directory: of the run; metrics.jsonl is read from it.
        summary: as in summary.json.
        gallery: images with the checker's verdicts.
        settings: nested configuration, shown as a table per entry.

    Returns:
        The page's path.
    """
    page = directory / "report.html"
    page.write_text(
        render(summary, read_metrics(directory / "metrics.jsonl"), gallery, settings), encoding="utf-8"
    )
    return page


def render(
    summary: dict[str, Any], metrics: list[dict[str, Any]], gallery: Gallery, settings: dict[str, Any]
) -> str:
    """The page as text."""
    return fill(
        "demo.html",
        strict_before=percent(summary["strict_before"]),
        strict_after=percent(summary["strict_after"]),
        backbone=escape(BACKBONES.get(summary["backbone"], summary["backbone"])),
        seed=summary["seed"],
        total=f"{sum(_phase_seconds(summary).values()):.0f}",
        headline=escape(headline(summary)),
        iterations=summary["iterations"],
        notice=_notice(summary),
        cards="\n".join(_cards(summary)),
        stride=gallery.stride,
        gallery="\n".join(_gallery(gallery)),
        charts=charts(metrics),
        scores="\n".join(_score_table(summary)),
        bars="\n".join(_bars(_phase_seconds(summary))),
        settings="\n".join(settings_tables(settings)),
        versions=escape(", ".join(f"{name} {number}" for name, number in summary["versions"].items())),
    )


def headline(summary: dict[str, Any]) -> str:
    """The result in one sentence, whichever way it went."""
    seconds = _phase_seconds(summary).get("training", 0.0)
    change = f"from {percent(summary['strict_before'])} to {percent(summary['strict_after'])}"
    training = f"{seconds:.0f} seconds of reinforcement learning"
    gain = summary["strict_after"] - summary["strict_before"]
    if abs(gain) < 2 * _standard_error(summary):
        learned = f"{training} were too few to tell: the share of held-out prompts it obeys went {change}"
    else:
        verb = "raised" if gain > 0 else "lowered"
        learned = f"{training} {verb} the share of held-out prompts it obeys {change}"
    return f"{learned}; steered by its own critic, it obeys {percent(summary['steered']['strict_after'])}."


def _standard_error(summary: dict[str, Any]) -> float:
    """The larger standard error of the run's two accuracies."""
    accuracies = summary["strict_before"], summary["strict_after"]
    return math.sqrt(max(rate * (1 - rate) for rate in accuracies) / summary["evaluation_samples"])


def _points(change: float) -> str:
    return f"{100 * change:+.1f} points".replace("-", "\N{MINUS SIGN}")


def _phase_seconds(summary: dict[str, Any]) -> dict[str, float]:
    return {name: seconds for name, seconds in summary["seconds"].items() if name in PHASES}


def _notice(summary: dict[str, Any]) -> str:
    if not summary["quick"]:
        return ""
    return (
        '<p class="notice"><strong>A shortened run.</strong> Every phase was cut short to show that it runs; '
        "leave out <code>--quick</code> to see the model learn.</p>"
    )


def _cards(summary: dict[str, Any]) -> Iterable[str]:
    steered = summary["steered"]
    before, after = percent(summary["strict_before"]), percent(summary["strict_after"])
    error = f"± {100 * _standard_error(summary):.1f}, n = {summary['evaluation_samples']}"
    yield card(
        "Obeys held-out prompts",
        after,
        f"{_points(summary['strict_after'] - summary['strict_before'])} by learning alone; {error}",
        before,
    )
    yield card(
        "Gold checker",
        percent(summary["gold_after"]),
        f"{_points(summary['gold_after'] - summary['gold_before'])} by a second checker, never trained on",
        percent(summary["gold_before"]),
    )
    forwards = f"{steered['forwards_per_image']:.1f} forwards per image"
    yield card(
        "Ground off by",
        f"{levels(summary['background_after'])} / 255",
        "distance of empty pixels from the data's grey, where no checker looks; the typical latent moved by "
        f"{summary['latent_drift']:.3f}",
        levels(summary["background_before"]),
    )
    yield card(
        "Base model, steered",
        percent(steered["strict"]),
        f"{_points(steered['strict'] - summary['strict_before'])} without training it, at {forwards}",
        before,
    )
    gain = _points(steered["strict_after"] - summary["strict_after"])
    yield card(
        "Trained model, steered",
        percent(steered["strict_after"]),
        f"{gain} on top of learning; gold {percent(steered['gold_after'])}",
        after,
    )
    variance = summary["explained_variance"]
    later = variance[len(variance) // 2 :]
    yield card(
        "Critic's explained variance",
        f"{sum(later) / len(later):.2f}",
        "mean over the second half of the denoising steps, on held-out prompts",
    )
    yield card("Images generated to learn", f"{summary['images']:,}", "value pretraining included")


def _gallery(gallery: Gallery) -> Iterable[str]:
    for index in gallery.rows:
        prompt = escape(gallery.prompts[index])
        figures = []
        for title, (images, verdicts) in gallery.columns.items():
            passed = bool(verdicts[index] > 0.5)
            verdict, mark = ("pass", "✓") if passed else ("fail", "✗")
            meaning = f"{prompt}: {escape(title)}, {'obeys' if passed else 'does not obey'}"
            source = png_data_uri(to_image(images[index]))
            figures.append(
                f'<figure class="{verdict}"><img src="{source}" alt="{meaning}">'
                f"<figcaption><b>{mark}</b> {escape(title)}</figcaption></figure>"
            )
        strip = "".join(figures)
        yield f'<article class="prompt"><h3>{prompt}</h3><div class="strip">{strip}</div></article>'


def levels(background: float) -> str:
    """The score shapes_background as a distance in levels of 255."""
    return f"{-255 * background:.1f}"


SCORES = ("strict", "gold", "reward", "ground off by, of 255", "forwards per image")


def score_rows(summary: dict[str, Any]) -> list[tuple[str, ...]]:
    """Model and SCORES of each: before and after, plain and steered."""
    steered, plain = summary["steered"], len(summary["explained_variance"])
    rows = []
    for when, end in (("before", ""), ("after", "_after")):
        scores = (percent(summary[f"{score}_{when}"]) for score in ("strict", "gold"))
        ground = levels(summary[f"background_{when}"])
        rows.append((when, *scores, f"{summary[f'reward_{when}']:.3f}", ground, f"{plain:.1f}"))
        scores = (percent(steered[f"{score}{end}"]) for score in ("strict", "gold"))
        ground, forwards = levels(steered[f"background{end}"]), f"{steered[f'forwards_per_image{end}']:.1f}"
        rows.append((f"{when}, steered", *scores, "", ground, forwards))
    return rows


def _score_table(summary: dict[str, Any]) -> Iterable[str]:
    columns = "".join(f"<th>{name}</th>" for name in ("", *SCORES))
    yield f"<thead><tr>{columns}</tr></thead><tbody>"
    for row in score_rows(summary):
        yield "<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>"
    yield "</tbody>"


def _bars(seconds: dict[str, float]) -> Iterable[str]:
    longest = max(seconds.values(), default=1.0) or 1.0
    for name, title in PHASES.items():
        if name in seconds:
            width = 100 * seconds[name] / longest
            yield (
                f'<div>{title}</div><div><div class="track" style="width: {width:.1f}%"></div></div>'
                f'<div class="seconds">{seconds[name]:.1f} s</div>'
            )
