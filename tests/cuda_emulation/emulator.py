"""The CUDA C++ kernels compiled for the CPU, each block's threads as fibers, in place of lacfast._C's."""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent


class EmulatedModule:
    """Has the cuda_* functions of lacfast._C; addresses are those of CPU tensors."""

    def __init__(self, library: Path) -> None:
        self._library = ctypes.CDLL(str(library))
        self._library.cuda_advantage_partials.restype = ctypes.c_int64

    def __getattr__(self, name: str) -> Callable[..., Any]:
        function = getattr(self._library, name)

        def call(*arguments: Any) -> Any:
            return function(*[_c_value(argument) for argument in arguments])

        return call


def _c_value(argument: Any) -> Any:
    if isinstance(argument, list):
        kind = ctypes.c_double if any(isinstance(item, float) for item in argument) else ctypes.c_int64
        return (kind * len(argument))(*argument)
    return ctypes.c_double(argument) if isinstance(argument, float) else ctypes.c_int64(int(argument))


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
