"""Reports in a browser: no complaint, nothing wider than a phone, boxes that hide, a page that renews."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lacfast.report.compare import write_comparison
from lacfast.report.pictures import contact_sheet, save_with_prompts
from lacfast.report.run import write_run_report
from lacfast.report.serve import RunServer
from tests.report.browser import WIDTHS, browser, fits, quiet_page
from tests.report.test_diagnostics import iteration
from tests.report.test_run import write_run

HOSTILE = "<img src=x onerror=alert(1)><script>alert(2)</script> &amp; quoted"


@pytest.fixture(scope="module")
def opened() -> Iterator[Any]:
    with browser() as found:
        yield found


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two runs with other settings, whose names and prompts would be markup if nothing escaped them."""
    root = tmp_path_factory.mktemp("runs")
    for name, rate in (("plain", 3e-4), ("<b>bold", 1e-3)):
        rewards = {f"reward/{HOSTILE}": 0.5, f"reward/{'a_long_name' * 6}": 0.5}
        write_run(root / name, first_max_abs_log_ratio=rate, **rewards)
        settings = {"train": {"iterations": 6, "batch_size": 128, "rate": rate}, "prompts": HOSTILE}
        (root / name / "run.json").write_text(json.dumps(settings), encoding="utf-8")
        picture = contact_sheet(torch.rand(12, 3, 8, 8, generator=torch.Generator().manual_seed(0)))
        save_with_prompts(picture, root / name / "samples" / "00000006.png", [HOSTILE] * 12)
    write_run_report(root / "<b>bold")
    write_comparison([root / "plain", root / "<b>bold"], root / "compare.html")
    return [root / "plain", root / "<b>bold"]


@pytest.mark.parametrize("width", WIDTHS)
def test_the_report_of_a_run_opens_without_a_complaint(opened: Any, runs: list[Path], width: str) -> None:
    page, said = quiet_page(opened, width=WIDTHS[width])
    page.goto((runs[1] / "report.html").as_uri())
    for summary in page.locator("summary").all():
        summary.click()
    assert page.locator("ol li").first.inner_text() == HOSTILE
    assert page.get_by_text("Use one dtype, attention backend").is_visible()
    assert said == []
    assert fits(page)
    page.close()


@pytest.mark.parametrize("width", WIDTHS)
def test_the_comparison_hides_a_run_and_changes_its_axis(opened: Any, runs: list[Path], width: str) -> None:
    page, said = quiet_page(opened, width=WIDTHS[width])
    page.goto((runs[0].parent / "compare.html").as_uri())
    lines = page.locator(".over.images .run-1")
    assert lines.first.is_visible()
    page.get_by_label("<b>bold").uncheck()
    assert not lines.first.is_visible()
    assert page.locator(".over.images .run-0").first.is_visible()
    page.get_by_label("hours").check()
    assert page.locator(".over.hours").first.is_visible()
    assert not page.locator(".over.images").first.is_visible()
    assert page.get_by_text("train.rate").is_visible()
    assert page.get_by_text("train.batch_size").count() == 0
    assert said == []
    assert fits(page)
    page.close()


def test_a_served_page_renews_itself_and_keeps_what_was_open(opened: Any, runs: list[Path]) -> None:
    server = RunServer(runs[0], 0)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        page, said = quiet_page(opened)
        page.clock.install()
        page.goto(server.address)
        page.wait_for_selector("html[data-live=yes]")
        page.locator("summary").last.click()
        assert "6 iterations" in page.locator(".kicker").inner_text()
        with (runs[0] / "metrics.jsonl").open("a", encoding="utf-8") as file:
            more = {"seconds_rollout": 1.0, "seconds_update": 1.0, "mean_kl_old": 0.0}
            file.write(json.dumps(iteration(7, **more)) + "\n")
        page.clock.run_for(2500)
        page.locator(".kicker", has_text="7 iterations").wait_for()
        assert page.locator("details").last.get_attribute("open") is not None
        assert said == []
        page.close()
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
