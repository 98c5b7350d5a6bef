"""Where a kernel cannot run, the reason is said and the reference takes its place."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from lacfast import ops

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
