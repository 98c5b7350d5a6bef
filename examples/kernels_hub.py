"""Writes the ops as Hugging Face's `kernels` fetches them: python examples/kernels_hub.py DIRECTORY

    kernels.get_kernel("OWNER/lacfast-ops", version=0, trust_remote_code=True).normal_noise(...)

The directory is a kernel repository, which kernels.get_local_kernel(DIRECTORY) reads too. build/torch-cuda
and build/torch-cpu hold the same Python, Triton on a GPU and the reference elsewhere. Imports are relative,
and ops are registered under a name of their own, so that several versions live in one process.
Layout: https://huggingface.co/docs/kernels/kernel-requirements
"""

from __future__ import annotations

import ast
import base64
import hashlib
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NAME = "lacfast-ops"
VERSION = 0
"""That of kernels whose interface may still change."""
CUDA_ARCHITECTURES = ["8.0", "8.6", "8.9", "9.0", "10.0", "12.0"]
INIT = '''"""Fused operations of lacfast; each has the name and signature of its equation in `reference`."""

from . import reference
from .ops import *
from .ops import __all__ as _names
from .records import NoiseKey, TransitionTable, TrajectorySlab

__all__ = ["NoiseKey", "TrajectorySlab", "TransitionTable", "reference", *_names]
'''


def sources() -> dict[str, Path]:
    """Path in the variant -> file, of the ops and of all that they import from the package."""
    found: dict[str, Path] = {}
    waiting = ["lacfast.ops"]
    while waiting:
        path = _file(waiting.pop())
        if path is None or path.relative_to(ROOT / "lacfast").as_posix() in found:
            continue
        found[path.relative_to(ROOT / "lacfast").as_posix()] = path
        waiting += _imports(path)
    for path in sorted((ROOT / "kernels").glob("*.*")):
        if path.suffix in (".py", ".json"):
            found[f"kernels/{path.name}"] = path
    found["kernels/__init__.py"] = ROOT / "lacfast" / "kernels" / "__init__.py"
    return found


def rewritten(name: str, text: str, identifier: str) -> str:
    """A source with relative imports and the ops' own namespace.

    Raises:
        ValueError: where something of the package is named otherwise.
    """
    up = "." * (name.count("/") + 1)
    text = re.sub(r"^(\s*)from lacfast import ", rf"\1from {up} import ", text, flags=re.MULTILINE)
    text = re.sub(r"^(\s*)from lacfast\.", rf"\1from {up}", text, flags=re.MULTILINE)
    text = text.replace('"lacfast::', f'"{identifier}::')
    package = f"{{__name__.rpartition('.{name.partition('/')[0]}.')[0]}}"
    text = re.sub(r'f?"lacfast\.(kernels\.|_C")', lambda match: f'f"{package}.{match[1]}', text)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import) and any(alias.name.startswith("lacfast") for alias in node.names):
            raise ValueError(
                f"{name}:{node.lineno} imports lacfast by its name; write `from lacfast.x import y`"
            )
    return text


def write(directory: Path) -> list[Path]:
    """The build variants of a kernel repository.

    Raises:
        ValueError: where the directory holds some already.
    """
    if (directory / "build").exists():
        raise ValueError(f"{directory}/build is there already; remove it, or name another directory")
    found = sources()
    version = hashlib.sha256(b"".join(path.read_bytes() for _, path in sorted(found.items()))).hexdigest()[
        :10
    ]
    identifier = f"lacfast_ops_{version}"
    files = {name: rewritten(name, path.read_text("utf-8"), identifier) for name, path in found.items()}
    files["__init__.py"] = INIT
    variants = []
    for backend in ({"type": "cpu"}, {"type": "cuda", "archs": CUDA_ARCHITECTURES}):
        variant = directory / "build" / f"torch-{backend['type']}"
        variant.mkdir(parents=True)
        for name, text in files.items():
            (variant / name).parent.mkdir(parents=True, exist_ok=True)
            (variant / name).write_text(text, encoding="utf-8")
        hashes = {name: _digest(variant / name) for name in sorted(files)}
        metadata = {
            "name": NAME,
            "id": identifier,
            "version": VERSION,
            "license": "Apache-2.0",
            "python-depends": [],
            "backend": backend,
            "digest": {"algorithm": "sha256", "files": hashes},
        }
        (variant / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n", encoding="utf-8")
        variants.append(variant)
    return variants


def _file(module: str) -> Path | None:
    path = ROOT.joinpath(*module.split("."))
    return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()), None)


def _imports(path: Path) -> Iterator[str]:
    """Modules of the package that a file imports, and the packages that they lie in."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lacfast"):
            parts = str(node.module).split(".")
            # The package itself is not copied: it would import everything by its name.
            yield from (".".join(parts[:count]) for count in range(2, len(parts) + 1))
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _digest(path: Path) -> str:
    return base64.b64encode(hashlib.sha256(path.read_bytes()).digest()).decode("ascii")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    for written in write(Path(sys.argv[1])):
        print(written)
