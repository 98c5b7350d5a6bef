"""Every CUDA source compiles for sm_80, sm_90, sm_100 without a warning and without spilling, GPU or not."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
ARCHITECTURES = [80, 90, 100]
MAX_REGISTERS = 128
CUDA_BIN = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin"
NVCC = shutil.which("nvcc") or shutil.which("nvcc", path=CUDA_BIN)

pytestmark = pytest.mark.skipif(NVCC is None, reason=f"no nvcc on PATH or in {CUDA_BIN}")


def test_there_are_sources() -> None:
    assert SOURCES


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.name)
def test_source_compiles_without_warnings_and_spills(source: Path, tmp_path: Path) -> None:
    targets = [f"--generate-code=arch=compute_{number},code=sm_{number}" for number in ARCHITECTURES]
    command = [
        NVCC, "-c", source, "-o", tmp_path / "object.o", *targets,
        "-std=c++17", "-O3", "--expt-relaxed-constexpr",
        "-Werror=all-warnings", "-Xcompiler=-Wall,-Wextra,-Wshadow,-Werror", "-Xptxas=-v",
    ]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    # One "Function properties" line per kernel and architecture; a source of host code has none.
    frames = re.findall(
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", result.stderr
    )
    assert all(frame == ("0", "0", "0") for frame in frames), result.stderr
    registers = [int(number) for number in re.findall(r"Used (\d+) registers", result.stderr)]
    assert max(registers, default=0) <= MAX_REGISTERS
    is_device_code = "__global__" in source.read_text()
    assert bool(registers) == is_device_code
    assert bool(frames) == is_device_code
