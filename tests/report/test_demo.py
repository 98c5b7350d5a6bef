"""The report: one file, nothing fetched, every number from the run, honest whichever way the run went."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

from lacfast.report.demo import headline, write_report
from lacfast.report.pictures import Gallery, save_pictures

STEPS = 4


def summary(**changes: Any) -> dict[str, Any]:
    values: dict[str, Any] = {
        "reward_before": 0.5,
        "reward_after": 0.7,
        "strict_before": 0.4512,
        "strict_after": 0.6034,
        "gold_before": 0.44,
        "gold_after": 0.59,
        "background_before": -2 / 255,
        "background_after": -7 / 255,
        "latent_drift": 0.1234,
        "steered": {
            "strict": 0.7321,
            "gold": 0.7211,
            "background": -3 / 255,
            "background_after": -8 / 255,
            "forwards_per_image": 13.0,
            "strict_after": 0.877,
            "gold_after": 0.8543,
            "forwards_per_image_after": 13.0,
        },
        "explained_variance": [0.0, 0.2, 0.5, 0.7],
        "images": 12345,
        "iterations": 3,
        "evaluation_samples": 1024,
        "seconds": {"pretraining": 10.0, "evaluation": 2.0, "training": 100.0, "total": 112.0},
        "seed": 7,
        "backbone": "dit",
        "budget": 120.0,
        "quick": False,
        "versions": {"python": "3", "lacfast": "0"},
    }
    return values | changes


def gallery() -> Gallery:
    images = torch.rand(12, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    verdicts = (torch.arange(12) % 2).float()
    columns = dict.fromkeys(("before", "after", "before, steered", "after, steered"), (images, verdicts))
    return Gallery([f"prompt <{row}>" for row in range(12)], columns, stride=5)


def write_metrics(directory: Path) -> None:
    per_step = [0.1, float("nan"), 0.3]
    rows: list[dict[str, Any]] = [
        {"phase": "value_pretraining", "iteration": 0, "explained_variance": [0.1] * STEPS}
    ]
    for iteration in range(3):
        rows.append(
            {
                "phase": "train",
                "iteration": iteration + 1,
                "reward/shapes": 0.5 + 0.1 * iteration,
                "explained_variance": [0.1, 0.2, 0.3],
                "clip_fraction_high": per_step,
                "clip_fraction_low": per_step,
                "kl_old": per_step,
            }
        )
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (directory / "metrics.jsonl").write_text(lines, encoding="utf-8")


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = tmp_path_factory.mktemp("demo")
    write_metrics(directory)
    settings = {"training": {"seed": 7, "ppo": {"clip_range": 1e-4}}}
    return write_report(directory, summary(), gallery(), settings).read_text(encoding="utf-8")


class _References(HTMLParser):
    """Collects what a browser would load, and whether every element that opens closes."""

    VOID = frozenset({"meta", "img", "br", "link", "input"})

    def __init__(self) -> None:
        super().__init__()
        self.references: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.references += [value for name, value in attrs if name in {"src", "href", "srcset"} and value]
        self.references += ["script"] if tag in {"script", "link", "iframe"} else []
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_page_is_well_formed_and_loads_nothing(page: str) -> None:
    parser = _References()
    parser.feed(page)
    assert parser.open == []
    external = [value for value in parser.references if not value.startswith(("data:image/png;base64,", "#"))]
    assert external == []
    assert "@import" not in page
    assert not re.search(r"url\((?!#)", page)


def test_page_states_the_numbers_of_the_run(page: str) -> None:
    shares = ("45.1 %", "60.3 %", "73.2 %", "87.7 %")
    for number in (*shares, "12,345", "n = 1024", "clip_range", "100.0 s", "7.0 / 255", "moved by 0.123"):
        assert number in page


def test_page_shows_chosen_prompts_with_verdicts_and_escapes_them(page: str) -> None:
    shown = re.findall(r"<h3>(prompt &lt;\d+&gt;)</h3>", page)
    assert shown == ["prompt &lt;0&gt;", "prompt &lt;5&gt;", "prompt &lt;10&gt;"]
    assert page.count('<figure class="pass">') == 4
    assert page.count('<figure class="fail">') == 8


def test_charts_take_the_page_s_text_colour_and_survive_missing_bins(page: str) -> None:
    assert page.count("<svg") == page.count('<div class="chart">') >= 8
    assert "currentColor" in page
    assert ">nan<" not in page.lower()


@pytest.mark.parametrize(("after", "word"), [(0.60, "raised"), (0.30, "lowered"), (0.46, "too few to tell")])
def test_headline_says_which_way_it_went(after: float, word: str) -> None:
    assert word in headline(summary(strict_after=after))


def test_a_quick_run_is_labelled_as_shortened(tmp_path: Path) -> None:
    write_metrics(tmp_path)
    page = write_report(tmp_path, summary(quick=True), gallery(), {}).read_text(encoding="utf-8")
    assert "A shortened run." in page


def test_pictures_are_written_for_every_model(tmp_path: Path) -> None:
    save_pictures(gallery(), tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"before.png", "after.png", "before_steered.png", "after_steered.png", "comparison.png"}
