"""The page of a training run: from its files alone, one file, every sign of failure with a remedy."""

from __future__ import annotations

import json
import re
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lacfast.cli import main
from lacfast.report.charts import alike
from lacfast.report.pictures import grid, save_with_prompts
from lacfast.report.run import headline, write_run_report
from tests.report.test_diagnostics import evaluation, iteration

SAME = "The same prompts and the same noise every time."
"""What is said of the pictures of evaluations whose files hold the same prompts."""


def write_run(directory: Path, *, evaluations: int = 3, **changes: Any) -> None:
    (directory / "samples").mkdir(parents=True)
    extra = {
        "advantage_std": [1.0, float("nan"), 0.9, 0.8],
        "kl_old": [1e-5] * 4,
        "kl_ref": [0.0] * 4,
        "mean_kl_old": 1e-5,
        "policy_grad_norm": 1e-4,
        "critic_grad_norm": 0.1,
        "value_loss": 0.7,
        "value_slope": 0.9,
        "seconds_rollout": 1.0,
        "seconds_update": 2.0,
    }
    records: list[dict[str, Any]] = [
        {"phase": "value_pretraining", "iteration": 0, "explained_variance": [0.1] * 4}
    ]
    for number in range(1, 7):
        records.append(iteration(number, **(extra | changes)))
    for number in range(0, 2 * evaluations, 2):
        records.append(evaluation(number, explained_variance=[0.1, 0.2, 0.4, 0.5]))
        images = torch.rand(12, 3, 8, 8, generator=torch.Generator().manual_seed(number))
        grid(images).save(directory / "samples" / f"{number:08d}.png")
    (directory / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (directory / "run.json").write_text(json.dumps({"train": {"seed": 3}}))


@pytest.fixture
def without_charts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Most of a page's time, for tests that look at what stands beside them."""
    monkeypatch.setattr("lacfast.report.run.charts", lambda records: "")


def test_the_page_shows_curves_pictures_and_settings(tmp_path: Path) -> None:
    write_run(tmp_path / "my-run")
    text = write_run_report(tmp_path / "my-run").read_text(encoding="utf-8")
    titles = ("Scores of evaluations", "What the critic explains, per step", "Calibration", "Diversity")
    for title in (*titles, "Drift of what is typical"):
        assert title in text
    assert text.count("data:image/png;base64,") >= 3
    assert "train.seed" in text
    assert "None of the known signatures of failure" in text
    assert "evaluation prompts also chose" in text
    assert not re.search(r'(src|href)="https?:', text)


@pytest.mark.usefixtures("without_charts")
def test_a_sign_of_failure_comes_with_its_remedy(tmp_path: Path) -> None:
    write_run(tmp_path / "run", evaluations=0, first_max_abs_log_ratio=1e-3)
    text = write_run_report(tmp_path / "run").read_text(encoding="utf-8")
    assert "The first ratio is not 1" in text
    assert "attention backend" in text


def test_a_run_without_critic_and_evaluations_has_a_page_too(tmp_path: Path) -> None:
    write_run(tmp_path / "run", evaluations=0, explained_variance=None, value_loss=None, value_slope=None)
    text = write_run_report(tmp_path / "run").read_text(encoding="utf-8")
    assert "Calibration" not in text
    assert "no evaluation compared them" in text
    assert "also chose" not in text
    # A map of nothing but zeros is not drawn.
    assert "KL to the anchor" not in text
    assert "KL, per step" in text


def test_the_last_evaluation_s_calibration_is_a_diagram_with_a_line_per_head(tmp_path: Path) -> None:
    write_run(tmp_path / "run")
    bins = [[-1.0, 0.0, 1.0], [-0.9, 0.1, 0.8], [0.1, 0.1, None]]
    record = evaluation(
        9, explained_variance=[0.1] * 4, **{"calibration/quality": bins, "calibration/size": bins}
    )
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(record) + "\n")
    text = write_run_report(tmp_path / "run").read_text(encoding="utf-8")
    chart = text[text.index("Calibration on evaluation prompts") :]
    chart = chart[: chart.index("</svg>")]
    assert "Calibration over the run" in text
    assert all(label in chart for label in ("quality", "size", "mean return"))


@pytest.mark.usefixtures("without_charts")
def test_a_picture_is_called_by_its_number_or_by_its_own_name(tmp_path: Path) -> None:
    write_run(tmp_path / "run", evaluations=1)
    samples = tmp_path / "run" / "samples"
    (samples / "iteration 5.png").write_bytes((samples / "00000000.png").read_bytes())
    text = write_run_report(tmp_path / "run").read_text(encoding="utf-8")
    assert re.findall(r"<figcaption>(.*?)</figcaption>", text) == ["iteration 0", "iteration 5"]
    assert SAME not in text, "without their prompts nobody knows"


@pytest.mark.usefixtures("without_charts")
def test_pictures_that_hold_their_prompts_are_said_to_be_of_the_same(tmp_path: Path) -> None:
    write_run(tmp_path / "run", evaluations=1)
    save_with_prompts(grid(torch.zeros(1, 3, 8, 8)), tmp_path / "run" / "samples" / "00000002.png", ["a cat"])
    text = write_run_report(tmp_path / "run").read_text(encoding="utf-8")
    assert SAME in text
    assert "<li>a cat</li>" in text


def test_scores_of_another_size_have_a_chart_of_their_own() -> None:
    records = [{"strict": 0.4, "ground": -0.01, "gold": 0.3, "kilobytes": -80}, {"strict": 0.7}]
    groups = alike(records, ["strict", "ground", "gold", "kilobytes"])
    assert groups == [["kilobytes"], ["strict", "gold"], ["ground"]]


def test_cells_without_an_image_show_the_page() -> None:
    pixels = np.asarray(grid(torch.zeros(12, 3, 8, 8), columns=10, scale=1, gap=2))
    assert pixels[3, 3].tolist() == [0, 0, 0, 255]
    assert pixels[13, -3].tolist() == [255, 255, 255, 0]


def test_no_column_is_wider_than_the_narrowest_phone() -> None:
    """320 pixels, of which the margins leave 285: a column is at most as wide as what there is."""
    style = resources.files("lacfast.report").joinpath("style.css").read_text(encoding="utf-8")
    page = resources.files("lacfast.report").joinpath("run.html").read_text(encoding="utf-8")
    widths = re.findall(r"minmax\((.*?), 1fr\)", style + page)
    assert len(widths) >= 4
    assert all(re.fullmatch(r"min\([\d.]+rem, 100%\)", width) for width in widths)
    cards = re.findall(r"^\.cards \{.*|^\.card \{.*", style, re.MULTILINE)
    assert "auto-fit" in cards[0]
    assert "min-width: 0; overflow-wrap: anywhere" in cards[1]


def test_long_names_stand_below_each_other_and_a_map_with_an_entry_is_drawn(tmp_path: Path) -> None:
    names = {"reward/jpeg_compressibility_of_all_pictures": 1.0, "reward/another_long_name": 2.0}
    write_run(tmp_path / "run", evaluations=0, kl_ref=[0.0, 1e-6, 0.0, 0.0], **names)
    text = write_run_report(tmp_path / "run").read_text(encoding="utf-8")
    assert "KL to the anchor" in text
    chart = text[text.index("Rewards that train") :].partition("</svg>")[0]
    places = [
        re.search(rf'<text[^>]*transform="translate\(([\d.]+) ([\d.]+)\)"[^>]*>{name}<', chart)
        or re.search(rf'<text[^>]*x="([\d.]+)" y="([\d.]+)"[^>]*>{name}<', chart)
        for name in ("jpeg_compressibility_of_all_pictures", "another_long_name")
    ]
    assert all(places), chart[-3000:]
    assert len({place[2] for place in places if place}) == 2


def test_a_reward_s_name_is_no_formula_is_not_left_out_and_fits(tmp_path: Path) -> None:
    names = {"reward/$a_1$": 0.5, "reward/_own": 0.25, f"reward/{'long' * 20}": 0.1}
    write_run(tmp_path / "run", evaluations=0, **names)
    text = write_run_report(tmp_path / "run").read_text(encoding="utf-8")
    (chart,) = re.findall(r"<h3>Rewards that train</h3>.*?</svg>", text, re.DOTALL)
    assert "$a_1$" in chart
    assert ">\u200b_own<" in chart
    assert f">{'long' * 5}…{'long' * 5}<" in chart


def test_the_headline_says_which_way_it_went() -> None:
    train = [iteration(1), iteration(2)]
    assert headline([evaluation(0, quality=0.6), evaluation(2, quality=0.25)], train) == (
        "quality on evaluation prompts went from 0.6 to 0.25"
    )


@pytest.mark.usefixtures("without_charts")
def test_the_command_writes_the_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "run")
    assert main(["report", str(tmp_path / "run")]) == 0
    assert (tmp_path / "run" / "report.html").stat().st_size > 10_000
    assert "report.html" in capsys.readouterr().out


def test_a_directory_without_a_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path)]) == 2
    assert "metrics.jsonl" in capsys.readouterr().err
    (tmp_path / "metrics.jsonl").write_text("")
    assert main(["report", str(tmp_path)]) == 2
    assert "not finished an iteration" in capsys.readouterr().err
