"""Imports point down only, no name shadows a dependency, the kernels know nothing but torch and Triton."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import lacfast

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "lacfast"
FLOORS = (
    ("_C", "kernels", "seeds", "transfer", "distributed"),
    ("records", "config"),
    ("schedule", "reference", "runtime"),
    ("ops", "prompts"),
    ("rewards",),
    ("critic", "advantages", "metrics", "tasks"),
    ("backbone",),
    ("policy", "checkpoint"),
    ("rollout", "steering", "backbones"),
    ("learning",),
    ("trainer",),
    ("report", "compat"),
    ("runs",),
    ("cli",),
    ("__main__",),
)
"""Rooms, modules or packages, from the bottom. A room knows those below; on one floor none knows another."""
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
DEPENDENCIES = {
    "torch", "triton", "diffusers", "transformers", "peft", "safetensors", "numpy", "scipy", "PIL",
    "matplotlib", "rich", "tyro", "nvtx", "xformers", "pybind11", "pytest", "hypothesis", "tensorboard",
    "wandb", "accelerate", "torchao", "yaml",
}  # fmt: skip
SOURCES = sorted(path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE / "kernels")


def _imports(path: Path) -> Iterator[str]:
    """Absolute names of what a module imports, also under TYPE_CHECKING, and of what a string names."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            # The kernels import each other relatively: their folder and their package have different names.
            assert node.level == 0 or path.parent.name == "kernels", f"{path}: write the full name"
            origin = f"lacfast.kernels.{node.module}" if node.level else str(node.module)
            yield origin
            # `from lacfast import ops` imports a module by its second name.
            yield from (f"{origin}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            name = node.value.partition(":")[0]
            if _file(name) is not None:
                yield name


def _file(name: str) -> Path | None:
    """The source of the module `lacfast.x.y`, None where there is none."""
    root, *parts = name.split(".")
    if root != "lacfast" or not parts or not all(part.isidentifier() for part in parts):
        return None
    path = PACKAGE.joinpath(*parts)
    files = (path.with_suffix(".py"), path / "__init__.py")
    return next((file for file in files if file.exists()), None)


def _room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def _rooms(path: Path) -> set[str]:
    """The rooms that a module knows."""
    files = (_file(name) for name in _imports(path))
    named = {_room(file) for file in files if file is not None}
    return named | ({"_C"} if any(name.startswith("lacfast._C") for name in _imports(path)) else set())


def test_every_room_has_a_floor_and_every_floor_its_rooms() -> None:
    found = {_room(path) for path in SOURCES} - {"__init__"} | {"_C", "kernels"}
    assert found == FLOOR.keys(), f"on one side only: {sorted(found ^ FLOOR.keys())}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path: Path) -> None:
    own = _room(path)
    if own == "__init__":
        return
    level = sorted(room for room in _rooms(path) - {own} if FLOOR[room] >= FLOOR[own])
    assert level == [], f"{path.relative_to(PACKAGE)} is not above {level}"


def test_no_module_imports_itself_in_a_circle() -> None:
    graph = {path: {file for name in _imports(path) if (file := _file(name)) is not None} for path in SOURCES}
    done: set[Path] = set()

    def walk(path: Path, behind: tuple[Path, ...]) -> None:
        circle = (
            [str(each.relative_to(PACKAGE)) for each in behind[behind.index(path) :]]
            if path in behind
            else []
        )
        assert circle == []
        if path not in done:
            for target in sorted(graph.get(path, set()) - {path}):
                # A package and its modules name each other by its re-exports alone.
                if target.name != "__init__.py" or target.parent != path.parent:
                    walk(target, (*behind, path))
            done.add(path)

    for path in SOURCES:
        walk(path, ())


def test_tests_mirror_the_rooms() -> None:
    rooms = {path.name for path in PACKAGE.iterdir() if path.is_dir()} | {
        "bench",
        "interpreter",
        "cuda_emulation",
    }
    tests = Path(__file__).parent
    folders = {path.parent.relative_to(tests).parts[0] for path in tests.glob("*/**/*.py")}
    assert folders <= rooms
    lone = {path.stem.removeprefix("test_") for path in tests.glob("test_*.py")}
    assert {name for name in lone if (PACKAGE / name).is_dir()} == set()


def test_an_upward_import_would_be_seen(tmp_path: Path) -> None:
    low = tmp_path / "low.py"
    low.write_text(
        "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n"
        "    from lacfast.trainer import LatentActorCriticTrainer\n"
        "LAZY = 'lacfast.runs.demo:run_demo'\n"
        "PROSE = 'see lacfast.cli for more'\n"
    )
    assert _rooms(low) == {"trainer", "runs"}


def test_the_package_itself_imports_nothing_heavy() -> None:
    roots = {name.split(".")[0] for name in _imports(PACKAGE / "__init__.py")}
    assert not roots & DEPENDENCIES


@pytest.mark.parametrize("path", sorted((ROOT / "kernels").glob("*.py")), ids=lambda path: path.name)
def test_kernels_import_only_torch_triton_and_each_other(path: Path) -> None:
    standard = {
        *("__future__", "collections.abc", "concurrent.futures", "functools", "json", "math", "pathlib"),
        *("threading", "typing", "warnings"),
    }
    for name in _imports(path):
        root = name.split(".")[0]
        allowed = root in {"torch", "triton"} or name.startswith("lacfast.kernels")
        assert allowed or any(name == module or name.startswith(f"{module}.") for module in standard), name


def test_the_types_of_the_package_name_what_it_offers() -> None:
    stub = ast.parse((PACKAGE / "__init__.pyi").read_text(encoding="utf-8"))
    offered = {
        alias.asname: str(node.module)
        for node in stub.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert {name: f"lacfast.{home}" for name, home in lacfast._HOMES.items()} == offered


def test_kernels_have_no_package_file() -> None:
    """A package `kernels` at the root would shadow Hugging Face's, which diffusers probes for."""
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_csrc_includes_no_torch_header() -> None:
    sources = [path for path in (ROOT / "csrc").rglob("*") if path.suffix in {".h", ".cpp", ".cu", ".inc"}]
    assert sources
    for path in sources:
        for line in path.read_text(encoding="utf-8").splitlines():
            assert not (
                line.startswith("#include") and ("torch/" in line or "ATen" in line or "c10/" in line)
            ), path


def _runs_what_it_reads(tree: ast.AST) -> Iterator[str]:
    """Calls that can run code from a file or a message, and readers that are made to."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and "pickle.Unpickler" in map(ast.unparse, node.bases):
            yield node.name
        if not isinstance(node, ast.Call):
            continue
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        called = ast.unparse(node.func)
        unpickles = called in ("pickle.load", "pickle.loads", "pickle.Unpickler", "eval", "exec", "yaml.load")
        if unpickles or (called == "torch.load" and given.get("weights_only") != "True"):
            yield called
        if given.get("trust_remote_code", "False") != "False":
            yield "trust_remote_code"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_nothing_that_is_read_can_run_code(path: Path) -> None:
    # Ranks of a run trust each other, as torch.distributed has it; see SECURITY.md.
    known = ["_Unpickler"] if path == PACKAGE / "distributed" / "messages.py" else []
    assert list(_runs_what_it_reads(ast.parse(path.read_text(encoding="utf-8")))) == known


def test_a_file_of_tensors_is_read_where_there_is_no_gpu() -> None:
    """What was saved on a device is held twice, or not read at all, where it comes back to it."""
    calls = [
        node
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load"
    ]
    assert calls
    for call in calls:
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        assert given.get("map_location") == "'cpu'", ast.unparse(call)


def test_reading_that_runs_code_would_be_seen() -> None:
    text = (
        "torch.load(f)\npickle.loads(b)\nM.from_pretrained(p, trust_remote_code=True)\neval(s)\nmodel.eval()"
    )
    assert len(list(_runs_what_it_reads(ast.parse(text)))) == 4
    assert list(_runs_what_it_reads(ast.parse("class Reader(pickle.Unpickler): ..."))) == ["Reader"]


def test_no_module_bears_the_name_of_a_dependency() -> None:
    modules = [*PACKAGE.rglob("*.py"), *(ROOT / "kernels").glob("*.py"), *(ROOT / "bench").rglob("*.py")]
    assert [path for path in modules if path.stem in DEPENDENCIES] == []


def _docstrings(tree: ast.AST) -> Iterator[str]:
    """Strings that stand alone: of modules, classes and functions, and those under fields."""
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Expr)
            and isinstance(node.value, ast.Constant)
            and isinstance(node.value.value, str)
        ):
            yield node.value.value


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_docstrings_begin_with_the_noun_that_they_describe(path: Path) -> None:
    hanging = {"Of", "That", "With", "By", "In", "As", "For", "Whose", "Towards"}
    texts = _docstrings(ast.parse(path.read_text(encoding="utf-8")))
    assert [text for text in texts if text.split(maxsplit=1)[0] in hanging] == []


def test_no_module_is_a_drawer_for_leftovers() -> None:
    drawers = {"utils", "util", "helpers", "common", "misc"}
    assert [path for path in SOURCES if path.stem in drawers or path.parent.name in drawers] == []


def test_no_python_file_is_longer_than_400_lines() -> None:
    long = [
        path
        for path in [*SOURCES, *(ROOT / "kernels").glob("*.py")]
        if len(path.read_text().splitlines()) > 400
    ]
    assert long == []


def test_the_whole_iteration_is_one_page() -> None:
    page = PACKAGE / "reference" / "iteration.py"
    assert len(page.read_text(encoding="utf-8").splitlines()) <= 150
