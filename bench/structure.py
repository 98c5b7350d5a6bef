"""How large the house is: files, lines, the longest chain of imports, circles, signatures; of any tree.

python -m bench.structure                    this tree
python -m bench.structure --root DIR         another one, beside it
"""

from __future__ import annotations

import argparse
import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MOST_PARAMETERS = 8
"""Positional parameters that a function may have."""
FOLDERS = ("lacfast", "kernels", "csrc", "bench", "tests")
SUFFIXES = {".py", ".pyi", ".h", ".cpp", ".cu", ".inc"}
Graph = dict[str, set[str]]
"""Module -> modules that it names."""


def sources(folder: Path) -> list[Path]:
    """The source files of a folder."""
    found = (path for path in folder.rglob("*") if path.suffix in SUFFIXES)
    # lacfast/kernels is a link to the kernels in an editable tree.
    return sorted(path for path in found if not path.is_symlink() and "__pycache__" not in path.parts)


def names(tree: ast.AST) -> Iterator[str]:
    """Absolute names that a module imports, also under TYPE_CHECKING, or names in a string of its own."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value.partition(":")[0]


def imports(root: Path, package: str) -> Graph:
    """Who names whom within a package; what a package's own file passes on is its origin's."""
    trees = {
        ".".join(path.relative_to(root).with_suffix("").parts): ast.parse(path.read_text(encoding="utf-8"))
        for path in sources(root / package)
        if path.suffix == ".py"
    }
    modules = {name for name in trees if not name.endswith(".__init__")}
    origins = {
        f"{name.removesuffix('.__init__')}.{passed.rpartition('.')[2]}": passed
        for name in trees.keys() - modules
        for passed in names(trees[name])
    }

    def module_of(name: str) -> str | None:
        origin = origins.get(name, name)
        if name in modules or origin == name:
            return next((each for each in (name, name.rpartition(".")[0]) if each in modules), None)
        return module_of(origin)

    return {
        module: {found for name in names(trees[module]) if (found := module_of(name))} - {module}
        for module in modules
    }


def rooms(graph: Graph) -> Graph:
    """The graph of what lies at the package's own level."""

    def room(name: str) -> str:
        return ".".join(name.split(".")[:2])

    found: Graph = {room(name): set() for name in graph}
    for name, others in graph.items():
        found[room(name)] |= {room(other) for other in others} - {room(name)}
    return found


def circles(graph: Graph) -> list[frozenset[str]]:
    """Groups of modules that reach each other."""
    reach = {name: _reached(graph, name) for name in graph}
    groups = {frozenset(o for o in reach[name] if name in reach[o]) for name in graph if name in reach[name]}
    return sorted(groups, key=sorted)


def _reached(graph: Graph, start: str) -> set[str]:
    found, pending = set[str](), [start]
    while pending:
        new = graph[pending.pop()] - found
        found |= new
        pending += new
    return found


def longest_chain(graph: Graph) -> int:
    """Modules on the longest way down by imports; a circle counts with all its modules."""
    groups = {name: frozenset({name}) for name in graph}
    groups |= {name: group for group in circles(graph) for name in group}
    lengths: dict[frozenset[str], int] = {}

    def length(group: frozenset[str]) -> int:
        if group not in lengths:
            below = {groups[other] for name in group for other in graph[name]} - {group}
            lengths[group] = len(group) + max(map(length, below), default=0)
        return lengths[group]

    return max(map(length, groups.values()), default=0)


def functions(folder: Path) -> list[ast.FunctionDef]:
    """Every function and method of a folder's modules."""
    trees = (ast.parse(path.read_text(encoding="utf-8")) for path in sources(folder) if path.suffix == ".py")
    return [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]


def positional(function: ast.FunctionDef) -> int:
    """Parameters that a call may give by position, self and cls aside."""
    parameters = [*function.args.posonlyargs, *function.args.args]
    return sum(each.arg not in ("self", "cls") for each in parameters)


def lines(folder: Path) -> int:
    return sum(len(path.read_text(encoding="utf-8").splitlines()) for path in sources(folder))


def measures(root: Path) -> dict[str, str]:
    """Name -> number of a tree."""
    package = root / "lacfast"
    level = [path for path in package.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()]
    found = {"modules and packages at lacfast's level": str(len(level))}
    for folder in FOLDERS:
        found[f"{folder}: files, lines"] = f"{len(sources(root / folder))}, {lines(root / folder):,}"
    for folder in ("lacfast", "bench"):
        modules = imports(root, folder)
        graphs = rooms(modules), modules
        for title, measure in (("longest chain", longest_chain), ("circles", lambda g: len(circles(g)))):
            found[f"{folder}: {title} of rooms, of modules"] = ", ".join(str(measure(g)) for g in graphs)
        crowded = sum(positional(each) > MOST_PARAMETERS for each in functions(root / folder))
        found[f"{folder}: functions with over {MOST_PARAMETERS} positional parameters"] = str(crowded)
    signatures = sum(each.body[0].lineno - each.lineno for each in functions(package / "ops"))
    found["signatures' share of lacfast/ops"] = f"{100 * signatures / lines(package / 'ops'):.0f} %"
    return found


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.structure", description=__doc__.split("\n")[0])
    parser.add_argument("--root", type=Path, help="another tree, shown first")
    options = parser.parse_args(arguments)
    columns = [measures(root) for root in (options.root, ROOT) if root is not None]
    for name in dict.fromkeys(name for column in columns for name in column):
        print(f"{name:<56}" + "".join(f"{column.get(name, ''):>16}" for column in columns))


if __name__ == "__main__":
    main()
