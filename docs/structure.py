"""Writes docs/structure.md from the first lines of modules: python docs/structure.py"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from textwrap import fill

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "structure.md"
HEAD = """# Where things are

To find the file that you want to read or change. Beside every folder and module of `lacfast/` stands its
own first line, below a folder its files. `python docs/structure.py` writes this page, and a test compares.
"""
BESIDES = {
    "csrc/": "C++ and CUDA C++ of the ops, behind raw pointers: the CPU's loops are in csrc/cpu",
    "kernels/": "Triton kernels, installed as lacfast.kernels; README.md has equations, bytes and rounding",
    "bench/": "What every figure is measured with: kernels, iterations, costs; learning in bench/learning",
    "tests/": "Rooms as in lacfast/; tests/interpreter runs the Triton kernels without a GPU",
}
"""Folders beside lacfast/, which have no first line that says as much."""
TAIL = """
If you know PPO, read in this order: `lacfast/reference/iteration.py` and what it calls, `lacfast/records.py`,
`lacfast/schedule.py`, `lacfast/trainer.py`, `lacfast/backbones/sd3.py`; then one op through the stack:
`lacfast/ops/gaussian_step.py`, `csrc/cpu/gaussian_step.inc`, `kernels/gaussian_step.py`.
"""


def first_line(module: Path) -> str:
    """Of the module's docstring, without the point."""
    docstring = ast.get_docstring(ast.parse(module.read_text(encoding="utf-8"))) or ""
    return docstring.partition("\n")[0].rstrip(".")


def rooms(package: Path) -> Iterator[str]:
    """Lines of the tree: every folder with its files, every module that stands alone."""
    for path in sorted(package.iterdir(), key=lambda path: (path.is_file(), path.name)):
        if path.suffix == ".py" and not path.name.startswith("_"):
            yield f"{path.name:16} {first_line(path)}"
        elif (path / "__init__.py").exists():
            yield f"{path.name + '/':16} {first_line(path / '__init__.py')}"
            files = ", ".join(sorted({file.stem for file in path.rglob("*.py")} - {"__init__"}))
            if files:
                yield fill(files, 110, initial_indent=" " * 19, subsequent_indent=" " * 19)


def page() -> str:
    """The whole page."""
    besides = [f"{name:16} {line}" for name, line in BESIDES.items()]
    return "\n".join([HEAD, "```text", *rooms(ROOT / "lacfast"), "", *besides, "```", TAIL])


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
