"""Where a kernel cannot run, the reason is said and the reference takes its place."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lacfast import ops

ROOT = Path(__file__).resolve().parents[2]
backend = sys.modules["lacfast.ops.backend"]


def test_a_device_before_bfloat16_is_told_what_the_kernels_need(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    reason = backend.unusable_reason.__wrapped__("triton")
    assert reason == "compute capability 7.5; the Triton kernels need 8.0, the first with bfloat16"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    assert not backend.unusable_reason.__wrapped__("triton")


def test_cuda_without_a_device_has_a_reason() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a device")
    assert ops.available()["cuda"] not in ("", "usable")


def test_the_choice_of_a_backend_is_marked_as_torch_marks_constants() -> None:
    assert vars(backend.choose) == vars(torch.compiler.assume_constant_result(lambda: None))


def test_importing_the_ops_does_not_import_the_compiler() -> None:
    """It takes nearly as long as torch itself. A test of seconds would fail on a busy machine."""
    names = "'torch._dynamo', 'triton', 'sympy'"
    program = f"import sys, lacfast.ops; print([name for name in ({names}) if name in sys.modules])"
    printed = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    ).stdout
    assert printed.strip() == "[]"


@pytest.mark.parametrize(
    ("version", "architectures"),
    [
        ("11.8.89", "80-real;90"),
        ("12.4.131", "80-real;90"),
        ("12.8.61", "80-real;90-real;100"),
        ("13.0.48", "80-real;90-real;100"),
    ],
)
def test_a_cuda_compiler_is_asked_for_the_gpus_that_it_knows(
    version: str, architectures: str, tmp_path: Path
) -> None:
    cmake = shutil.which("cmake", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if cmake is None:
        pytest.skip("CMake is not installed")
    script = tmp_path / "asked.cmake"
    script.write_text(
        f"include({ROOT / 'csrc' / 'cuda' / 'architectures.cmake'})\n"
        f"lacfast_architectures({version} found)\n"
        'message("${found}")\n'
    )
    asked = subprocess.run([cmake, "-P", str(script)], capture_output=True, text=True, check=True)
    assert asked.stderr.strip() == architectures
