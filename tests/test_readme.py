"""The README keeps its word: its example runs, the map is the tree, its figures are the recorded run's."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
STRUCTURE = (ROOT / "docs" / "structure.md").read_text(encoding="utf-8")


def fenced(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def mapped() -> set[str]:
    """Paths of the repository map, folders with a slash."""
    paths, folder = set(), ""
    for line in STRUCTURE.partition("```text\n")[2].partition("```")[0].splitlines():
        name = line.split()[0]
        if line.startswith(" "):
            name = folder + name
        elif name.endswith("/"):
            folder = name
        paths.add(name)
    return paths


def tracked() -> list[str]:
    """Files that git knows or would take; skips outside a checkout."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        pytest.skip("not a git checkout")
    return [line for line in result.stdout.splitlines() if (ROOT / line).exists()]


def test_example_has_at_most_15_lines_and_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (example,) = fenced("python")
    assert len([line for line in example.splitlines() if line.strip()]) <= 15
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {}
    exec(compile(example, "README.md", "exec"), namespace)
    assert namespace["images"].shape == (4, 3, 32, 32)
    assert namespace["again"].critic is not None


def test_map_names_everything_and_nothing_else() -> None:
    files = tracked()
    top = {f"{path.split('/')[0]}/" for path in files if "/" in path}
    inside = {
        f"lacfast/{parts[1]}" + ("/" if len(parts) > 2 else "")
        for path in files
        if (parts := path.split("/"))[0] == "lacfast" and not parts[1].startswith(("_", "py.typed"))
    }
    assert mapped() == top | inside


def test_files_that_the_readme_points_to_exist() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
    order = STRUCTURE.partition("**Reading order**")[2].partition("\n\n")[0]
    for name in re.findall(r"`([^`]+)`", order):
        assert (ROOT / name).exists() or (ROOT / "lacfast" / name).exists(), name


def test_commands_are_two_and_use_the_pinned_set() -> None:
    commands = fenced("bash")
    assert len(commands) == 2
    assert all("pip install -c constraints.txt" in command for command in commands)
    assert "lacfast demo --out" in commands[0]
    assert "pytest" in commands[1]


def test_readme_fits_its_length() -> None:
    assert len(README.splitlines()) <= 170
