"""The measures of the house count what they say, on a small house whose numbers are known."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench import structure


@pytest.fixture
def house(tmp_path: Path) -> Path:
    files = {
        "lacfast/__init__.py": "",
        "lacfast/records.py": "A = 1\n",
        "lacfast/ops/__init__.py": "from lacfast.ops.loss import loss\n",
        "lacfast/ops/loss.py": (
            "from lacfast.records import A\n"
            "def loss(\n    a, b, c, d, e, f, g, h, *, i\n):\n    return a\n"
            "def crowded(self, a, b, c, d, e, f, g, h, i): return a\n"
        ),
        "lacfast/trainer.py": "from lacfast.ops import loss\nLAZY = 'lacfast.cli:main'\n",
        "lacfast/cli.py": (
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from lacfast.trainer import LAZY\n"
        ),
    }
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


def test_imports_are_followed_through_a_package_a_string_and_type_checking(house: Path) -> None:
    assert structure.imports(house, "lacfast") == {
        "lacfast.records": set(),
        "lacfast.ops.loss": {"lacfast.records"},
        "lacfast.trainer": {"lacfast.ops.loss", "lacfast.cli"},
        "lacfast.cli": {"lacfast.trainer"},
    }


def test_a_circle_is_found_and_counts_whole_in_the_chain(house: Path) -> None:
    graph = structure.imports(house, "lacfast")
    assert structure.circles(graph) == [frozenset({"lacfast.cli", "lacfast.trainer"})]
    assert structure.longest_chain(graph) == 4
    assert structure.rooms(graph)["lacfast.ops"] == {"lacfast.records"}


def test_the_measures_of_a_tree(house: Path) -> None:
    found = structure.measures(house)
    assert found["modules and packages at lacfast's level"] == "5"
    assert found["lacfast: files, lines"] == "6, 13"
    assert found["lacfast: circles of rooms, of modules"] == "1, 1"
    assert found["lacfast: functions with over 8 positional parameters"] == "1"
    # Three lines of `loss` before its body, none of `crowded`.
    assert found["signatures' share of lacfast/ops"] == f"{100 * 3 / 7:.0f} %"


def test_this_house_has_no_circle() -> None:
    for package in ("lacfast", "bench"):
        graph = structure.imports(structure.ROOT, package)
        assert structure.circles(graph) == structure.circles(structure.rooms(graph)) == []
