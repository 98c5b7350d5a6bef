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
    """Its source files, generated and linked ones aside."""
    return sorted(
        path
        for path in folder.rglob("*")
        if path.suffix in SUFFIXES and not path.is_symlink() and "__pycache__" not in path.parts
    )


def names(tree: ast.AST) -> Iterator[str]:
    """Absolute names that a module imports, also under TYPE_CHECKING, or names as "package.module:object"."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value.partition(":")[0]


def imports(root: Path, package: str) -> Graph:
    """Who names whom within a package; a package's own file counts as the names that it passes on."""
    files = {
        ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): path
        for path in sources(root / package)
        if path.suffix == ".py"
    }
    passing_on = {name for name, path in files.items() if path.name == "__init__.py"}

    def module_of(name: str) -> str | None:
        while name and name not in files:
            name = name.rpartition(".")[0]
        return name if name not in passing_on else None

    trees = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in files.items()}
    graph = {
        name: {found for each in names(tree) if (found := module_of(each) if "." in each else None)} - {name}
        for name, tree in trees.items()
    }
    return {name: found for name, found in graph.items() if name not in passing_on}


def circles(graph: Graph) -> list[set[str]]:
    """Groups of modules that reach each other."""
    reach = {name: _reached(graph, name) for name in graph}
    groups = {
        frozenset({name, *(other for other in reach[name] if name in reach[other])})
        for name in graph
        if name in reach[name]
    }
    return [set(group) for group in sorted(groups, key=sorted)]


def _reached(graph: Graph, start: str) -> set[str]:
    found: set[str] = set()
    pending = [start]
    while pending:
        new = graph.get(pending.pop(), set()) - found
        found |= new
        pending += new
    return found


def longest_chain(graph: Graph) -> int:
    """Modules on the longest way down by imports; a circle counts with all its modules."""
    groups = {name: group for group in map(frozenset, circles(graph)) for name in group}
    lengths: dict[frozenset[str], int] = {}

    def length(group: frozenset[str]) -> int:
        if group not in lengths:
            below = {groups.get(other, frozenset({other})) for name in group for other in graph.get(name, ())}
            lengths[group] = len(group) + max(map(length, below - {group}), default=0)
        return lengths[group]

    return max((length(groups.get(name, frozenset({name}))) for name in graph), default=0)


def rooms(graph: Graph) -> Graph:
    """The graph of the package's rooms: what lies at its own level."""
    found: Graph = {}
    for name, others in graph.items():
        room = _room(name)
        found.setdefault(room, set()).update({_room(other) for other in others} - {room})
    return found


def _room(name: str) -> str:
    return ".".join(name.split(".")[:2])


def functions(folder: Path) -> Iterator[tuple[Path, ast.FunctionDef]]:
    for path in sources(folder):
        if path.suffix == ".py":
            nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            yield from ((path, node) for node in nodes if isinstance(node, ast.FunctionDef))


def crowded(folder: Path) -> list[str]:
    """Functions with more than MOST_PARAMETERS positional parameters, self and cls aside."""
    return [
        f"{path.relative_to(folder.parent)}:{node.name}"
        for path, node in functions(folder)
        if sum(each.arg not in ("self", "cls") for each in [*node.args.posonlyargs, *node.args.args])
        > MOST_PARAMETERS
    ]


def signature_share(folder: Path) -> float:
    """Lines of signatures, from `def` to the colon, over all lines."""
    lines = sum(node.body[0].lineno - node.lineno for _, node in functions(folder))
    return lines / sum(_lines(path) for path in sources(folder))


def _lines(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def measures(root: Path) -> dict[str, str]:
    """Name -> number of a tree."""
    package = root / "lacfast"
    level = [path for path in package.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()]
    graph = imports(root, "lacfast")
    found = {"modules and packages at lacfast's level": str(len(level))}
    found["modules of lacfast"] = str(len(graph))
    for folder in FOLDERS:
        paths = sources(root / folder)
        found[f"{folder}: files, lines"] = f"{len(paths)}, {sum(map(_lines, paths)):,}"
    found["longest chain of imports: rooms, modules"] = (
        f"{longest_chain(rooms(graph))}, {longest_chain(graph)}"
    )
    for folder in ("lacfast", "bench"):
        between = imports(root, folder)
        counts = [len(circles(each)) for each in (rooms(between), between)]
        found[f"{folder}: circles of rooms, of modules"] = f"{counts[0]}, {counts[1]}"
    for folder in ("lacfast", "bench"):
        count = len(crowded(root / folder))
        found[f"{folder}: functions with over {MOST_PARAMETERS} positional parameters"] = str(count)
    found["signatures' share of lacfast/ops"] = f"{100 * signature_share(package / 'ops'):.0f} %"
    return found


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--root", type=Path, help="of another tree, shown first")
    options = parser.parse_args(arguments)
    columns = [measures(root) for root in (options.root, ROOT) if root is not None]
    for name in dict.fromkeys(name for column in columns for name in column):
        print(f"{name:<56}" + "".join(f"{column[name]:>16}" for column in columns))


if __name__ == "__main__":
    main()
