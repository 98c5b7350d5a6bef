"""CUDA code for sm_80, sm_90, sm_100, GPU or not: no warning, no stack, no spill; the built module too."""

import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from lacfast import _C, ops

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
ARCHITECTURES = [80, 90, 100]
MAX_REGISTERS = 128
CUDA_BIN = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin"
NVCC = shutil.which("nvcc") or shutil.which("nvcc", path=CUDA_BIN)

needs_nvcc = pytest.mark.skipif(NVCC is None, reason=f"no nvcc on PATH or in {CUDA_BIN}")


def test_there_are_sources() -> None:
    assert SOURCES


# The module was built of them too, and its kernels are looked at below.
@pytest.mark.slow
@needs_nvcc
@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.name)
def test_source_compiles_without_warnings_and_spills(source: Path, tmp_path: Path) -> None:
    targets = [f"--generate-code=arch=compute_{number},code=sm_{number}" for number in ARCHITECTURES]
    command = [
        NVCC, "-c", source, "-o", tmp_path / "object.o", *targets,
        "-std=c++17", "-O3", "--expt-relaxed-constexpr", '-DLACFAST_ARCHITECTURES="80"',
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


def cuobjdump() -> Path | None:
    """Triton's copy, else that of the CUDA toolkit."""
    triton = importlib.util.find_spec("triton")
    folders = [CUDA_BIN]
    if triton is not None and triton.origin is not None:
        folders.insert(0, Path(triton.origin).parent / "backends" / "nvidia" / "bin")
    return next((folder / "cuobjdump" for folder in folders if (folder / "cuobjdump").exists()), None)


def built_kernels() -> dict[int, dict[str, dict[str, int]]]:
    """architecture -> mangled name -> resources, as the built module has them."""
    tool = cuobjdump()
    if tool is None:
        pytest.skip("no cuobjdump: neither triton nor a CUDA toolkit is installed")
    if "cuda.gae" not in _C.kernel_names():
        pytest.skip(f"lacfast._C has no kernels: {ops.available()['cuda']}")
    command = [tool, "--dump-resource-usage", _C.__file__]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    kernels: dict[int, dict[str, dict[str, int]]] = {}
    for section in re.split(r"^Fatbin elf code:", listing, flags=re.MULTILINE)[1:]:
        architecture = int(re.search(r"arch = sm_(\d+)", section).group(1))
        for name, resources in re.findall(r"Function (\S+):\s*\n\s*(REG:.*)", section):
            usage = {key: int(value) for key, value in re.findall(r"([A-Z]+)(?:\[\d\])?:(\d+)", resources)}
            kernels.setdefault(architecture, {})[name] = usage
    return kernels


def test_every_kernel_of_the_built_module_keeps_to_registers() -> None:
    kernels = built_kernels()
    assert sorted(kernels) == ARCHITECTURES
    defined = set(re.findall(r"\b(\w+_kernel)\(", "".join(source.read_text() for source in SOURCES)))
    assert defined
    for architecture, resources in kernels.items():
        missing = {kernel for kernel in defined if not any(kernel in name for name in resources)}
        assert missing == set(), f"sm_{architecture}"
        for name, usage in resources.items():
            assert usage["STACK"] == usage["LOCAL"] == 0, f"sm_{architecture} {name}: {usage}"
            assert usage["REG"] <= MAX_REGISTERS, f"sm_{architecture} {name}: {usage}"
            # What a block may have without asking for more at the launch.
            assert usage["SHARED"] <= 48 * 1024, f"sm_{architecture} {name}: {usage}"
