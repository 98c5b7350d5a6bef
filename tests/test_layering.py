"""Imports point down only, no name shadows a dependency, the kernels know nothing but torch and Triton."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "lacfast"
LAYERS = (
    ("_C", "kernels"),
    ("records", "sample_ids", "config", "run_config", "precision", "profiling", "distributed"),
    ("schedule", "reference", "graph", "cuda_graph", "fake_graph"),
    ("ops",),
    ("protocols", "prompts", "scoring", "reward_queue", "value_loss", "critic"),
    ("sampler", "rollout_sampler", "training_tables", "advantages", "optimizers", "microbatch"),
    ("minibatch", "update_totals", "update_runner"),
    (
        "update",
        "reference_step",
        "adaptive_kl",
        "early_stopping",
        "trackers",
        "metrics",
        "explained_variance",
        "value_confidence",
        "value_pretraining",
        "value_replay",
        "checkpoint",
        "averaging",
        "evaluation",
        "experience",
    ),
    ("costs", "counters", "run_directory", "learner", "diagnostics"),
    ("trainer", "steering"),
    ("backbones", "rewards", "compat", "tasks"),
    (
        "presets",
        "baseline_presets",
        "run",
        "steering_run",
        "pictures",
        "terminal",
        "demo",
        "report",
        "environment",
        "cli",
        "__main__",
    ),
)
"""From the bottom; a module may import its own layer and those below. Subpackages count as one module."""
RANK = {module: rank for rank, layer in enumerate(LAYERS) for module in layer}
DEPENDENCIES = {
    "torch", "triton", "diffusers", "transformers", "peft", "safetensors", "numpy", "scipy", "PIL",
    "matplotlib", "rich", "tyro", "nvtx", "xformers", "pybind11", "pytest", "hypothesis", "tensorboard",
    "wandb", "accelerate", "torchao",
}  # fmt: skip
SOURCES = sorted(path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE / "kernels")


def _imports(path: Path) -> Iterator[str]:
    """Absolute names of what a module imports when it runs; blocks under TYPE_CHECKING do not run."""
    pending: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            pending += node.orelse
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            # The kernels import each other relatively: their folder and their package have different names.
            assert node.level == 0 or path.parent.name == "kernels", f"{path}: write the full name"
            origin = f"lacfast.kernels.{node.module}" if node.level else str(node.module)
            yield origin
            # `from lacfast import ops` imports a module by its second name.
            yield from (f"{origin}.{alias.name}" for alias in node.names)
        else:
            pending += ast.iter_child_nodes(node)


def _module(name: str) -> str | None:
    """The layered module that an absolute name lies in; None for the package itself and its public names."""
    parts = name.split(".")
    if parts[0] != "lacfast" or len(parts) < 2:
        return None
    known = parts[1] in RANK or (PACKAGE / parts[1]).exists() or (PACKAGE / f"{parts[1]}.py").exists()
    return parts[1] if known else None


def test_every_module_has_a_layer() -> None:
    found = {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in SOURCES} - {"__init__"}
    assert found <= RANK.keys(), f"give these a layer: {sorted(found - RANK.keys())}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path: Path) -> None:
    own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if own == "__init__":
        return
    modules = {module for name in _imports(path) if (module := _module(name)) is not None}
    upward = sorted(module for module in modules if RANK[module] > RANK[own])
    assert upward == [], f"{path.name} is below {upward}"


def test_the_package_itself_imports_nothing_heavy() -> None:
    roots = {name.split(".")[0] for name in _imports(PACKAGE / "__init__.py")}
    assert not roots & DEPENDENCIES


@pytest.mark.parametrize("path", sorted((ROOT / "kernels").glob("*.py")), ids=lambda path: path.name)
def test_kernels_import_only_torch_triton_and_each_other(path: Path) -> None:
    standard = {"__future__", "collections.abc", "functools", "json", "math", "pathlib", "typing"}
    for name in _imports(path):
        root = name.split(".")[0]
        allowed = root in {"torch", "triton"} or name.startswith("lacfast.kernels")
        assert allowed or any(name == module or name.startswith(f"{module}.") for module in standard), name


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


def test_no_module_bears_the_name_of_a_dependency() -> None:
    modules = [*PACKAGE.rglob("*.py"), *(ROOT / "kernels").glob("*.py"), *(ROOT / "bench").rglob("*.py")]
    assert [path for path in modules if path.stem in DEPENDENCIES] == []


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
