"""bench/profile.py without Nsight: a trace that opens and a table by span."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from bench import profile
from lacfast.runtime.profiling import recorded_by_torch, span


def test_trace_of_an_op_holds_its_operators(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["op", "gaussian_step", "--cases", "tiny", "--iterations", "1", "--out", str(tmp_path)]
    assert profile.main(arguments) == 0
    events = json.loads((tmp_path / profile.TRACE).read_text(encoding="utf-8"))["traceEvents"]
    assert any(event.get("cat") == "cpu_op" for event in events)
    assert "trace: " in capsys.readouterr().out


def test_table_counts_spans_and_orders_them_by_time() -> None:
    with torch.profiler.profile() as recorded, recorded_by_torch():
        for _ in range(3):
            with span("rollout/step"):
                torch.randn(200, 200) @ torch.randn(200, 200)
        with span("sync"):
            pass
    _, first, second = profile.spans_table(recorded, on_device=False).splitlines()
    assert first.split()[:2] == ["lacfast/rollout/step", "3"]
    assert second.split()[:2] == ["lacfast/sync", "1"]


def test_nsight_needs_a_gpu_and_nvtx_and_ops_a_name(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert profile.main(["training", "--tool", "nsight"]) == 2
    assert "--tool torch" in capsys.readouterr().err
    with monkeypatch.context() as without:
        without.setattr(profile.importlib.util, "find_spec", lambda name: None)
        assert profile.main(["training", "--tool", "nsight", "--device", "cuda"]) == 2
    assert "pip install 'lacfast[profile]'" in capsys.readouterr().err
    assert profile.main(["op", "softmax"]) == 2
    assert "gaussian_step" in capsys.readouterr().err
