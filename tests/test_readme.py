"""The README keeps its word: its lines run, its commands are two, its status is what is recorded."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_pipelines import PROMPTS, RESOLUTION, tiny_pipeline
from tiny_trainers import shrunk

from lacfast.backbones.families import PIPELINES

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
TINY = {
    '"stabilityai/stable-diffusion-3.5-medium"': "pipeline",
    'device="cuda"': 'device="cpu"',
    '"sd35m-pickscore").train': '"sd35m-pickscore").train; config = shrunk(config)',
    "train(100": "train(1",
}
"""What the README's lines say, and what a CPU without downloads runs in its place."""


def fenced(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_its_twelve_lines_train_save_and_steer_a_stable_diffusion_3(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (example,) = fenced("python")
    assert len([line for line in example.splitlines() if line.strip()]) == 12
    for shown, ours in TINY.items():
        assert example.count(shown) == 1, shown
        example = example.replace(shown, ours)
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {"pipeline": tiny_pipeline("sd3"), "shrunk": shrunk}
    exec(compile(example, "README.md", "exec"), namespace)
    assert namespace["images"].shape == (4, 3, *RESOLUTION)
    assert namespace["stats"].evaluations.images == 4
    assert -1 <= float(capsys.readouterr().out) <= 1
    # What the last line's comment says of plain diffusers.
    plain = tiny_pipeline("sd3")
    before = plain(PROMPTS[0], num_inference_steps=2, output_type="pt", generator=torch.manual_seed(0)).images
    plain.load_lora_weights(tmp_path / "runs" / "red")
    after = plain(PROMPTS[0], num_inference_steps=2, output_type="pt", generator=torch.manual_seed(0)).images
    assert not torch.equal(before, after)


def test_its_new_imports_import() -> None:
    (diff,) = fenced("diff")
    added = [line[1:] for line in diff.splitlines() if line.startswith("+")]
    assert len(added) == 3
    for line in added:
        exec(line, {})


def test_its_commands_are_two_and_use_the_pinned_set() -> None:
    commands = fenced("bash")
    assert len(commands) == 2
    assert all("pip install -c constraints.txt" in command for command in commands)
    assert "lacfast demo --out" in commands[0]
    assert "pytest" in commands[1]


def test_its_status_has_every_family_and_claims_no_gpu_without_a_record() -> None:
    section = README.partition("## Status")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| \[.*", section, re.MULTILINE)
    pages = [page for row in rows for page in re.findall(r"\((docs/families/\w+\.md)\)", row)]
    assert sorted(pages) == sorted(f"docs/families/{page.name}" for page in ROOT.glob("docs/families/*.md"))
    texts = [(ROOT / page).read_text(encoding="utf-8") for page in pages]
    assert all(any(f"`{pipeline}`" in text for text in texts) for pipeline in PIPELINES)
    records = [json.loads(path.read_text(encoding="utf-8")) for path in ROOT.glob("bench/results/*.json")]
    drivers = {record["machine"]["driver"] for record in records if "machine" in record}
    if drivers == {"none"}:
        assert all(row.endswith("| not yet | not yet |") for row in rows)


def test_it_fits_its_length() -> None:
    lines = README.splitlines()
    assert len(lines) <= 110
    # Who lands here knows what it is and what to type before they scroll.
    assert any(line.startswith("python3 -m venv") for line in lines[:20])
