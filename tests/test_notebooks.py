"""The notebooks run, on tiny models where they name large ones, and Jupyter reads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_pipelines import saved_pipeline

from tests.report.test_run import write_run

NOTEBOOKS = sorted((Path(__file__).resolve().parents[1] / "notebooks").glob("*.py"))
TINY = {
    "method": {},
    "steer": {
        '"stabilityai/stable-diffusion-3.5-medium"': '"pipeline"',
        'DEVICE = "cuda"': 'DEVICE = "cpu"',
        "num_steps=10": "num_steps=4",
        "batch_size=96, rollout_batch_size=24": (
            "batch_size=4, rollout_batch_size=2, "
            "pretrain=lacfast.ValuePretrainingConfig(iterations=1, held_out_samples=4)"
        ),
        "particles=8": "particles=2",
    },
    "reward": {},
    "report": {},
}
"""What a notebook says, and what a CPU runs in seconds in its place."""


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    if path.stem == "steer":
        saved_pipeline("sd3", tmp_path / "pipeline")
    if path.stem == "report":
        write_run(tmp_path / "runs" / "shapes", first_max_abs_log_ratio=1e-3)
        settings = {"train": {"iterations": 9, "batch_size": 128}}
        (tmp_path / "runs" / "shapes" / "run.json").write_text(json.dumps(settings), encoding="utf-8")
    text = path.read_text(encoding="utf-8")
    for said, here in TINY[path.stem].items():
        assert said in text
        text = text.replace(said, here)
    namespace: dict[str, Any] = {"__name__": path.stem}
    exec(compile(text, path.name, "exec"), namespace)
    if path.stem == "method":
        # The mean distance of two uniform numbers to begin with; the toy learns.
        assert sum(namespace["means"][:5]) / 5 < -0.35
        assert sum(namespace["means"][-5:]) / 5 > -0.2
    printed = capsys.readouterr().out
    expected = {
        "method": "mean reward",
        "reward": "jpeg_compressibility",
        "steer": "forwards per image",
        "report": "The first ratio is not 1",
    }
    assert expected[path.stem] in printed


def test_jupyter_reads_them() -> None:
    jupytext = pytest.importorskip("jupytext", reason="jupytext is not installed")
    for path in NOTEBOOKS:
        cells = jupytext.read(path)["cells"]
        assert {"markdown", "code"} == {cell["cell_type"] for cell in cells}
        assert cells[0]["cell_type"] == "markdown"
        assert cells[0]["source"].startswith("# ")
