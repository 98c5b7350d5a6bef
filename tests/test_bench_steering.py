"""The steering bench compares at one budget, goes on where it stopped, and its intervals are paired."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from tiny_backbones import PROMPTS, brightness, tiny_backbone, tiny_config

from bench import steering
from bench.steering_arms import BASELINE, UNSTEERED, arms
from lacfast import schedule
from lacfast.checkpoint import save_backbone
from lacfast.config import SamplerConfig
from lacfast.steering import planned_evaluations
from lacfast.tasks import scenes
from lacfast.trainer import LatentActorCriticTrainer

TABLE = schedule.flow_sde(schedule.uniform_sigmas(8), 0.7, window=(0, 5))


@pytest.mark.parametrize("budget", [25.0, 40.0, 64.0])
def test_every_method_stays_within_the_budget_and_spends_most_of_it(budget: float) -> None:
    found = arms(TABLE, SamplerConfig(num_steps=8), budget, "value")
    assert {UNSTEERED, BASELINE, "pruning", "guidance", "smc", "beam"} <= found.keys()
    for method, candidates in found.items():
        costs = [planned_evaluations(candidate, TABLE) for candidate in candidates]
        assert max(costs) <= budget
        if method != UNSTEERED:
            assert min(costs) >= 0.7 * budget, (method, costs)


def test_a_budget_without_an_image_is_refused() -> None:
    with pytest.raises(ValueError, match=r"holds no image of 8\.0 forwards"):
        arms(TABLE, SamplerConfig(num_steps=8), 7.0, "value")


def test_the_interval_is_of_paired_differences_and_of_prompts() -> None:
    random = np.random.default_rng(0)
    prompts = [f"prompt {index % 40}" for index in range(400)]
    baseline = random.normal(size=400)
    mean, low, high = steering.paired_interval(baseline + 0.5, baseline, prompts)
    assert low == pytest.approx(mean) == pytest.approx(high) == pytest.approx(0.5)
    of_prompts = random.normal(size=40)
    difference = of_prompts[[index % 40 for index in range(400)]]
    _, low, high = steering.paired_interval(baseline + difference, baseline, prompts)
    # 40 prompts, however many images each has.
    assert high - low == pytest.approx(2 * 1.96 * of_prompts.std() / 40**0.5, rel=0.15)


def test_it_runs_is_resumed_and_refuses_other_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = LatentActorCriticTrainer(tiny_backbone("dit"), brightness, PROMPTS, tiny_config())
    trainer.pretrain_critic()
    save_backbone(trainer.backbone, tmp_path / "model")
    settings = {"train": {"sampler": {"num_steps": 4, "window": None}}}
    (tmp_path / "run.json").write_text(json.dumps(settings), encoding="utf-8")
    out = tmp_path / "steering.json"
    arguments = [str(tmp_path / "model"), "--out", str(out), "--budget", "16", "--seeds", "1"]
    arguments += ["--images", "4", "--tuning-images", "2", "--candidates", "1", "--choosers", "value"]
    arguments += ["--prompts", "shapes", "--gold", "shapes_gold"]
    monkeypatch.setattr("lacfast.run.PROMPT_SOURCES", {"shapes": lambda: scenes.TASK.split()[0][:2]})
    steering.main(arguments)
    first = json.loads(out.read_text(encoding="utf-8"))
    assert "best of n" in capsys.readouterr().out
    for cell in first["cells"].values():
        assert cell["evaluations_per_image"] <= 16 + 16
        assert len(cell["scores"]["shapes"]) in (2, 4)
    monkeypatch.setattr(steering, "measure", lambda *_: pytest.fail("measured again"))
    steering.main(arguments)
    assert json.loads(out.read_text(encoding="utf-8")) == first
    with pytest.raises(ValueError, match=r"is of other settings \(budget\); choose another --out"):
        steering.main([*arguments, "--budget", "20"])
