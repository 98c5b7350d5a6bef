"""The site: it builds without a warning, and on a phone no page is wider than the window."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.report.browser import browser, fits, quiet_page

ROOT = Path(__file__).resolve().parents[1]
PHONE = 390
ELSEWHERE = re.compile(r'<(?:link|script|img|iframe)\b[^>]*\b(?:src|href)="((?:https?:)?//[^"]*)"')
"""What a page loads from another server."""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site as `mkdocs build --strict` makes it: a link that leads nowhere is an error."""
    pytest.importorskip("mkdocs", reason="mkdocs is not installed: pip install 'lacfast[docs]'")
    built = tmp_path_factory.mktemp("site")
    # With --quiet its warnings would not count.
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(built)]
    result = subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return built


def test_it_builds_and_asks_no_other_server(site: Path) -> None:
    pages = [path.read_text(encoding="utf-8") for path in site.rglob("*.html")]
    assert len(pages) > 30
    assert [address for page in pages for address in ELSEWHERE.findall(page)] == []


def test_no_page_is_wider_than_a_phone(site: Path) -> None:
    with browser() as opened:
        page, said = quiet_page(opened, width=PHONE)
        wide = []
        # That of a server alone, whose root it names.
        for path in sorted(set(site.rglob("*.html")) - {site / "404.html"}):
            page.goto(path.as_uri())
            if not fits(page):
                wide.append(path.relative_to(site).as_posix())
    assert wide == []
    assert said == []
