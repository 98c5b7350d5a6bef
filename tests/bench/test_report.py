"""Every generated table has one home, holds what is recorded, and nothing else is taken for proof."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import report

ROOT = Path(__file__).resolve().parents[2]
HOMES = {path: path.read_text(encoding="utf-8") for path in report.PAGES}


def test_every_table_has_one_home_that_shows_the_recorded_results() -> None:
    blocks = report.blocks()
    names = {
        "proof",
        "demo",
        "demo-seeds",
        "figures",
        "kernels",
        "kernel-counts",
        "iteration",
        "costs",
        "host-work-amd",
        "host-work-intel",
    }
    names |= {
        "kernels-intel-avx2",
        "kernels-avx2",
        "kernels-avx512",
        "roofline-amd",
        "roofline-intel",
        "memory",
        "allocations",
        "ocr",
    }
    names |= {"ranks-apart", "ranks-on-paper", "ranks-strong", "threads-amd", "threads-intel"}
    assert set(blocks) == names
    assert report.pages(blocks, HOMES) == HOMES, "run `python -m bench.report`"
    demos = json.loads(report.DEMOS.read_text(encoding="utf-8"))
    assert len({demo["seed"] for demo in demos}) == len(demos) >= 3
    assert not any(demo["quick"] for demo in demos)
    assert (report.RECORD / report.PICTURE).exists()


@pytest.mark.parametrize("homes", [0, 2])
def test_a_table_without_a_home_or_with_two_is_refused(homes: int) -> None:
    begin, end = report.markers("costs")
    texts = [f"{begin}\n{end}"] * homes + ["nothing"]
    pages = {Path(f"{number}.md"): text for number, text in enumerate(texts)}
    with pytest.raises(ValueError, match=f"stands in {homes} of 0.md"):
        report.pages({"costs": "table"}, pages)


def test_links_of_a_table_follow_it_into_docs() -> None:
    begin, end = report.markers("proof")
    text, page = "![picture](docs/demo/comparison.png)", f"{begin}\n{end}"
    written = report.pages({"proof": text}, {Path("README.md"): "", Path("docs/results.md"): page})
    assert written[Path("docs/results.md")] == f"{begin}\n![picture](demo/comparison.png)\n{end}"
    assert text in report.pages({"proof": text}, {Path("README.md"): page})[Path("README.md")]


def test_a_marker_without_its_end_is_refused() -> None:
    begin, end = report.markers("costs")
    with pytest.raises(ValueError, match=f"not followed by {end}"):
        report.updated(f"{begin}\ntable", "costs", "table")


def test_a_quick_run_is_not_taken_for_proof(tmp_path: Path) -> None:
    (tmp_path / "seed-0").mkdir()
    (tmp_path / "seed-0" / "summary.json").write_text('{"quick": true}', encoding="utf-8")
    with pytest.raises(ValueError, match="shortens none"):
        report.record(tmp_path)
    with pytest.raises(ValueError, match="pass the folder of"):
        report.record(tmp_path / "nothing")


def test_figures_script_fails_cleanly(capsys: pytest.CaptureFixture[str]) -> None:
    assert report.main([str(ROOT / "nowhere")]) == 2
    assert capsys.readouterr().err.startswith("report: ")
