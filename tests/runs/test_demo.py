"""The demo end to end on the smallest scale: its files, its numbers, its second run, its refusals."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from lacfast import load_backbone
from lacfast.config import NFT
from lacfast.report.records import read_metrics
from lacfast.runs.demo import GAUGINGS, DemoScale, gaugings_due, run_demo
from lacfast.runs.recipes import recipe
from lacfast.runs.saved import saved_model, trained_sampler
from lacfast.runs.terminal import PhaseLog, done_fraction, show_summary
from lacfast.runtime.directories import locked

TINY = DemoScale(pretrain_steps=2, evaluation_samples=20, value_iterations=1, batch_size=8, min_iterations=2)
PROMISED_KEYS = {
    "reward_before", "reward_after", "strict_before", "strict_after", "gold_before", "gold_after", "steered",
    "explained_variance", "images", "seconds", "seed", "backbone", "versions", "budget", "background_before",
    "background_after", "latent_drift",
}  # fmt: skip


@pytest.fixture(autouse=True)
def _restore_threads() -> Any:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def quiet_log() -> tuple[PhaseLog, io.StringIO]:
    output = io.StringIO()
    return PhaseLog(Console(file=output, width=200)), output


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], str]:
    """One demo with a budget that is spent before it starts: the floor of every phase still runs."""
    out = tmp_path_factory.mktemp("demo") / "new" / "directory"
    log, output = quiet_log()
    threads = torch.get_num_threads()
    summary = run_demo(out, budget=0.5, seed=3, scale=TINY, log=log)
    torch.set_num_threads(threads)
    return out, summary, output.getvalue()


def test_summary_holds_what_the_readme_promises(run: tuple[Path, dict[str, Any], str]) -> None:
    out, summary, _ = run
    assert json.loads((out / "summary.json").read_text(encoding="utf-8")) == summary
    assert summary.keys() >= PROMISED_KEYS
    assert len(summary["explained_variance"]) == 8
    assert summary["steered"].keys() >= {"strict", "gold", "forwards_per_image", "strict_after", "gold_after"}
    assert summary["steered"].keys() >= {"background", "background_after"}
    assert {"pretraining", "evaluation", "value_pretraining", "training", "steering", "total"} <= summary[
        "seconds"
    ].keys()
    # Two iterations, one rollout of value pretraining and its held-out rollout.
    assert summary["images"] == 2 * 8 + 8 + 20


def test_all_files_are_there(run: tuple[Path, dict[str, Any], str]) -> None:
    out, _, _ = run
    assert {path.name for path in out.iterdir()} == {
        "summary.json", "metrics.jsonl", "run.json", "run.lock", "images", "report.html", "pretrained",
        "trained",
    }  # fmt: skip
    assert len(list((out / "images").glob("*.png"))) == 5
    assert (out / "report.html").read_text(encoding="utf-8").count("<svg") >= 10


def test_steering_finds_the_demos_model_and_its_sampler(run: tuple[Path, dict[str, Any], str]) -> None:
    model = saved_model(str(run[0]))
    assert load_backbone(model).critic is not None
    assert trained_sampler(model) == recipe("shapes").train.sampler


def test_metrics_have_every_iteration_of_the_recipe_s_objective(
    run: tuple[Path, dict[str, Any], str],
) -> None:
    rows = [row for row in read_metrics(run[0] / "metrics.jsonl") if row["phase"] == "train"]
    assert [row["iteration"] for row in rows] == [1, 2]
    assert recipe("shapes").train.objective == NFT()
    for row in rows:
        assert max(row["distance_old"]) > 0, "several optimizer steps of a rollout leave the old policy"


def test_trained_model_loads_with_its_critic(run: tuple[Path, dict[str, Any], str]) -> None:
    backbone = load_backbone(run[0] / "trained")
    assert backbone.critic is not None
    assert backbone.critic.num_rewards == 1


def test_output_without_a_terminal_is_one_plain_line_per_phase(run: tuple[Path, dict[str, Any], str]) -> None:
    output = run[2]
    assert "\x1b" not in output
    assert sum(line.startswith("✓") for line in output.splitlines()) == 9


def test_second_run_uses_the_base_model_again_and_starts_alike(run: tuple[Path, dict[str, Any], str]) -> None:
    out, first, _ = run
    log, output = quiet_log()
    second = run_demo(out, budget=0.5, seed=3, scale=TINY, log=log)
    assert "loaded from" in output.getvalue()
    assert second["reward_before"] == first["reward_before"]
    assert sum(row["phase"] == "train" for row in read_metrics(out / "metrics.jsonl")) == 2
    assert second["reward_after"] == first["reward_after"]


def test_out_that_cannot_be_written_is_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way", encoding="utf-8")
    with pytest.raises(ValueError, match=r"cannot write to --out .*file/demo.*choose a directory"):
        run_demo(tmp_path / "file" / "demo", scale=TINY)


def test_two_processes_do_what_one_does(run: tuple[Path, dict[str, Any], str], tmp_path: Path) -> None:
    log, output = quiet_log()
    together = run_demo(tmp_path, budget=0.5, seed=3, scale=TINY, processes=2, log=log)
    assert sum(line.startswith("✓") for line in output.getvalue().splitlines()) == 9
    assert together["processes"] == 2
    assert run[1]["processes"] == 1
    for name in ("images", "iterations", "evaluation_samples"):
        assert together[name] == run[1][name], name
    for name in ("reward_before", "reward_after", "background_after"):
        assert together[name] == pytest.approx(run[1][name], abs=1e-4), name
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [row["iteration"] for row in rows if row["phase"] == "train"] == [1, 2]


@pytest.mark.parametrize(
    ("settings", "flag"),
    [({"budget": 0.0}, "--budget"), ({"processes": 0}, "--processes"), ({"processes": 9}, "--processes")],
)
def test_settings_out_of_range_are_refused(tmp_path: Path, settings: dict[str, Any], flag: str) -> None:
    with pytest.raises(ValueError, match=flag):
        run_demo(tmp_path, scale=TINY, **settings)
    assert list(tmp_path.iterdir()) == []


def test_two_demos_do_not_write_into_one_directory(tmp_path: Path) -> None:
    with locked(tmp_path), pytest.raises(ValueError, match="is in use by process"):
        run_demo(tmp_path, scale=TINY)
    assert not (tmp_path / "run.json").exists()


def test_progress_never_claims_to_be_done_before_the_floor() -> None:
    assert done_fraction(1, seconds=10.0, budget=5.0, minimum=4) == 0.25
    assert done_fraction(1, seconds=1.0, budget=10.0, minimum=1) == 0.1
    assert done_fraction(9, seconds=10.0, budget=0.0, minimum=4) == 1.0


def test_drift_is_gauged_at_even_distances_within_the_training() -> None:
    due = [gaugings_due(float(second), 120.0) for second in range(0, 121, 10)]
    assert due == [min(second // 2, GAUGINGS) for second in range(13)]
    assert gaugings_due(3.0, -1.0) == 0


def test_closing_table_shows_all_four_models(run: tuple[Path, dict[str, Any], str]) -> None:
    output = io.StringIO()
    show_summary(run[1], run[0], Console(file=output, width=120))
    assert all(
        name in output.getvalue()
        for name in ("before", "before, steered", "after", "after, steered", "report.html")
    )
