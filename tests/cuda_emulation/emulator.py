"""The CUDA C++ kernels compiled for the CPU, each block's threads as fibers, in place of lacfast._C's."""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lacfast.ops.backend import extension

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent


class EmulatedModule:
    """Has the kernels cuda.* as lacfast._C has them; addresses are those of CPU tensors."""

    def __init__(self, library: Path) -> None:
        self._library = ctypes.CDLL(str(library))

    def kernel(self, name: str, formats: Sequence[str]) -> Callable[..., None]:
        def call(*records: tuple[Any, ...]) -> None:
            words = [extension().addresses(*pair) for pair in zip(formats, records, strict=True)]
            self._library.call(name.encode(), (ctypes.c_char_p * len(words))(*words))

        return call


def build(compiler: str, folder: Path) -> EmulatedModule:
    """Compile csrc/cuda against the headers of this folder, warnings as errors."""
    library = folder / "cuda_emulated.so"
    sources = [source for source in (ROOT / "csrc" / "cuda").glob("*.cu") if source.name != "runtime.cu"]
    # -ffp-contract=off: resampling promises the same ancestors wherever multiplications are not fused.
    flags = ["-std=c++17", "-O0", "-fPIC", "-shared", "-Wall", "-Wextra", "-Werror", "-ffp-contract=off"]
    command = [compiler, *flags, f"-I{HERE}", "-o", library, HERE / "entry.cpp", "-x", "c++", *sources]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise RuntimeError(result.stderr)
    return EmulatedModule(library)
