"""What the site adds to docs/: the changelog, and the sources that pages link to, each as a page."""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
LINK = re.compile(r"\]\(((?:\.\./)+[^)#\s]+)")


def on_files(files: Files, config: Any) -> Files:
    """Make a page of every file outside docs/ that a page links to."""
    files.append(File.generated(config, "changes.md", content=(ROOT / "CHANGELOG.md").read_text("utf-8")))
    made: set[str] = set()
    for page in files.documentation_pages():
        for link in LINK.findall(page.content_string):
            path = _outside(page.src_uri, link)
            if path is not None and path not in made:
                made.add(path)
                files.append(File.generated(config, f"sources/{path}.md", content=_shown(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Lead links to files outside docs/ to their pages."""

    def led(match: re.Match[str]) -> str:
        path = _outside(page.file.src_uri, match[1])
        if path is None:
            return match[0]
        depth = len(PurePosixPath(page.file.src_uri).parent.parts)
        return f"]({'../' * depth}sources/{path}.md"

    if page.file.src_uri == "changes.md":
        # It stands beside docs/, as its links do.
        markdown = markdown.replace("](docs/", "](")
    return LINK.sub(led, markdown)


def _outside(page: str, link: str) -> str | None:
    """The path in the repository of a link that leaves docs/, None for one that stays."""
    target = (ROOT / "docs" / page).parent.joinpath(link).resolve()
    if target.is_relative_to(ROOT / "docs"):
        return None
    return target.relative_to(ROOT).as_posix()


def _shown(path: Path) -> str:
    name = path.relative_to(ROOT).as_posix()
    kind = {".py": "python", ".sh": "bash"}.get(path.suffix, "")
    return f"# `{name}`\n\n````{kind}\n{path.read_text('utf-8')}\n````\n"
