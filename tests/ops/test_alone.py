"""The ops without the rest: what importing them brings, and their copy for Hugging Face's kernels hub."""

from __future__ import annotations

import importlib
import importlib.util
import json
import re
import runpy
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from lacfast import ops
from lacfast.records import NoiseKey

ROOT = Path(__file__).resolve().parents[2]
BLOCKED = (
    "diffusers",
    "transformers",
    "peft",
    "matplotlib",
    "scipy",
    "rich",
    "tyro",
    "huggingface_hub",
    "yaml",
)


def test_the_page_s_code_runs_where_the_trainer_s_dependencies_are_not() -> None:
    (block,) = re.findall(
        r"^```python\n(.*?)^```", (ROOT / "docs" / "ops.md").read_text("utf-8"), re.DOTALL | re.MULTILINE
    )
    script = f"import sys\nsys.modules.update(dict.fromkeys({BLOCKED}))\n{block}"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "reference" in result.stdout


def test_importing_them_brings_no_module_of_another_package_but_torch_s() -> None:
    """What it takes beyond torch, counted: time would depend on what else the machine does."""
    script = (
        "import sys, torch; before = set(sys.modules); import lacfast.ops; "
        "print(*sorted(set(sys.modules) - before))"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    found = result.stdout.split()
    assert [name for name in found if name.partition(".")[0] != "lacfast"] == []
    assert "lacfast.ops.gaussian_step" in found
    assert len(found) <= 60


@pytest.fixture(scope="module")
def variants(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    script = runpy.run_path(str(ROOT / "examples" / "kernels_hub.py"))
    found: list[Path] = script["write"](tmp_path_factory.mktemp("repository"))
    return found


def imported(variant: Path, name: str) -> ModuleType:
    """The variant under a name of its own, as the hub's loader imports it."""
    spec = importlib.util.spec_from_file_location(
        name, variant / "__init__.py", submodule_search_locations=[str(variant)]
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def fetched(variants: list[Path]) -> Any:
    return imported(variants[0], "fetched_ops")


def test_the_copy_computes_what_the_package_does(fetched: Any) -> None:
    steps = torch.arange(3)
    key = NoiseKey.create(7, range(3))
    own = fetched.NoiseKey.create(7, range(3))
    with ops.backend("reference"), fetched.backend("reference"):
        expected, found = ops.normal_noise((3, 8), steps, key), fetched.normal_noise((3, 8), steps, own)
        rewards, values = torch.randn(2, 3, 5, 2)
        assert torch.equal(expected, found)
        for one, other in zip(fetched.gae(rewards, values), ops.gae(rewards, values), strict=True):
            assert torch.equal(one, other)


def test_the_copy_imports_itself_and_torch_alone(variants: list[Path]) -> None:
    allowed = {*sys.stdlib_module_names, "torch", "triton"}
    for path in variants[1].rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        named = re.findall(
            r"^\s*(?:from|import) ([A-Za-z_]\w*)", re.sub(r'""".*?"""', "", text, flags=re.S), re.M
        )
        assert set(named) <= allowed, path
        assert not re.search(r'"lacfast(::|\.(?:kernels|_C))', text), path
    assert (variants[1] / "kernels" / "launches.json").is_file()


def test_the_metadata_names_every_file_and_a_namespace_of_its_own(variants: list[Path], fetched: Any) -> None:
    for variant, backend in zip(variants, ("cpu", "cuda"), strict=True):
        metadata = json.loads((variant / "metadata.json").read_text(encoding="utf-8"))
        assert variant.name == f"torch-{backend}"
        assert metadata["backend"]["type"] == backend
        assert metadata["id"].isidentifier()
        files = {path.relative_to(variant).as_posix() for path in variant.rglob("*.*") if path.is_file()}
        assert {name for name in files if "__pycache__" not in name} == {
            *metadata["digest"]["files"],
            "metadata.json",
        }
        assert hasattr(getattr(torch.ops, metadata["id"]), "gae")


def test_hugging_face_s_loader_takes_it(variants: list[Path]) -> None:
    # Without a file: this repository's own folder `kernels`, a namespace package on the tests' path.
    spec = importlib.util.find_spec("kernels")
    if spec is None or spec.origin is None:
        pytest.skip("Hugging Face's kernels is not installed")
    kernels = importlib.import_module("kernels")
    found = kernels.get_local_kernel(variants[0].parents[1], backend="cpu")
    assert (
        found.normal_noise((1, 4), torch.zeros(1, dtype=torch.long), found.NoiseKey.create(0, range(1)))
        .isfinite()
        .all()
    )
