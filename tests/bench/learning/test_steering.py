"""The steering bench compares at one budget, goes on where it stopped, and its intervals are paired."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny_backbones import barely_trained, tiny_backbone, tiny_config

from bench.learning import steering, steering_section, units
from bench.learning.problems import Materials, Prompts
from bench.learning.steering_arms import BASELINE, UNSTEERED, arms
from bench.learning.study_config import study_config
from lacfast import schedule
from lacfast.checkpoint import save_backbone
from lacfast.config import SamplerConfig, SteeringConfig
from lacfast.prompts import PromptSet
from lacfast.runtime.directories import whole_directory
from lacfast.steering import planned_evaluations, steer
from lacfast.steering.cost import BACKWARD_COST
from lacfast.tasks import scenes
from lacfast.tasks.storage import save_pretrained
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


@pytest.fixture(scope="module")
def materials(tmp_path_factory: pytest.TempPathFactory) -> Materials:
    """A barely trained model: steering does not care."""
    folder = tmp_path_factory.mktemp("materials")
    with whole_directory(folder / "shapes-dit") as target:
        save_pretrained(barely_trained(), target)
    return Materials(folder)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Tiny critics and four methods; the page is not written. Returns the prompts of every call of steer."""
    preset = study_config("dit")
    pretraining = replace(preset.pretrain, iterations=1, held_out_samples=8)
    monkeypatch.setattr(
        "bench.learning.steering.study_config", lambda *_: replace(preset, batch_size=8, pretrain=pretraining)
    )
    seen: list[list[str]] = []

    def recorded(backbone: Any, prompts: PromptSet, config: SteeringConfig, **named: Any) -> Any:
        seen.append(list(prompts.texts))
        return steer(backbone, prompts, config, **named)

    def few(*arguments: Any) -> dict[str, list[SteeringConfig]]:
        return {name: found for name, found in arms(*arguments).items() if name in METHODS}

    monkeypatch.setattr(steering, "steer", recorded)
    monkeypatch.setattr(steering, "arms", few)
    monkeypatch.setattr(steering.page, "write", lambda results: None)
    return seen


METHODS = (UNSTEERED, BASELINE, "pruning", "guidance")


def command(materials: Materials, out: Path, *more: str) -> list[str]:
    sizes = ["--budget", "16", "--images", "4", "--tuning-images", "2", "--candidates", "2", "--seeds", "2"]
    sizes += ["--train-iterations", "1", "--choosers", "value"]
    return ["--materials", str(materials.folder), "--out", str(out), *sizes, *more]


def test_settings_are_chosen_on_other_prompts_than_those_reported_and_the_run_is_resumed(
    tmp_path: Path, materials: Materials, quick: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "steering" / "dit"
    steering.main(command(materials, out, "--minutes", "0"))
    assert quick == [], "nothing begins after the deadline"
    steering.main(command(materials, out))
    prompts = Prompts.of(scenes.TASK)
    tuning, held_out = ({prompt.text for prompt in part} for part in (prompts.tuning, prompts.held_out))
    tuned = [texts for texts in quick if len(texts) == 2]
    reported = [texts for texts in quick if len(texts) == 4]
    assert len(tuned) >= 2
    assert all(set(texts) <= tuning for texts in tuned)
    assert len(reported) == 2 * len(METHODS)
    assert all(set(texts) <= held_out for texts in reported)
    found = {key: unit for key, unit in units.load(out).items() if "-seed" in key}
    assert list(found) == [
        f"value-{method}-seed{seed}"
        for method in ("best-of-n", "guidance", "one-image", "pruning")
        for seed in (0, 1)
    ]
    for unit in found.values():
        cost = unit["forwards_per_image"] + BACKWARD_COST * unit["backwards_per_image"]
        assert unit["evaluations_per_image"] == pytest.approx(cost)
        assert (unit["backwards_per_image"] > 0) == (unit["method"] == "guidance")
        assert len(unit["scores"]["shapes_strict"]) == 4
    calls = len(quick)
    steering.main(command(materials, out))
    assert len(quick) == calls, "what is there is not measured again"
    with pytest.raises(ValueError, match=r"is of other settings \(budget\); choose another --out"):
        steering.main(command(materials, out, "--budget", "20"))

    pictures = tmp_path / "docs" / "results"
    (section,) = steering_section.sections(tmp_path, pictures)
    assert "paired seeds: 2" in section
    assert "prompts that train, choose settings and report are disjoint" in section
    assert (pictures / "steering-dit.png").stat().st_size > 10_000


def unit(method: str, seed: int, strict: float) -> dict[str, Any]:
    scores = {"shapes": [strict], "shapes_strict": [strict], "shapes_gold": [0.5]}
    costs = {"forwards_per_image": 40.0, "backwards_per_image": 0.0, "evaluations_per_image": 40.0}
    return {
        "chooser": "value",
        "method": method,
        "seed": seed,
        "reward_calls_per_image": 0.0,
        "value": 1.0,
        **{"diversity": 0.1, "scores": scores} | costs,
    }


def test_the_page_compares_with_best_of_n_over_paired_seeds_and_shows_losses(tmp_path: Path) -> None:
    study = tmp_path / "steering" / "dit"
    settings = {"reward": "shapes", "gold": ["shapes_strict", "shapes_gold"], "budget": 40.0, "images": 1}
    units.require_settings(
        study, settings | {"tuning_images": 1, "training": {"iterations": 0, "trunk": "branch"}}
    )
    for seed, best in enumerate((0.5, 0.6, 0.7)):
        for method, gain in ((BASELINE, 0.0), ("pruning", 0.1), ("guidance", -0.2)):
            units.write(
                study, f"value-{method.replace(' ', '-')}-seed{seed}", unit(method, seed, best + gain)
            )
    # A seed that one method lacks is not compared.
    units.write(study, "value-pruning-seed3", unit("pruning", 3, 0.0))
    (section,) = steering_section.sections(tmp_path, tmp_path / "docs" / "results")
    assert "+0.100 [+0.100, +0.100] ahead" in section
    assert "-0.200 [-0.200, -0.200] behind" in section
    assert "| pruning | 40.0 | 0.0 | 40.0 | 0 | 1.00 | 0.700 | 0.700 | 0.500 |" in section


def test_saved_models_are_steered_and_one_without_a_critic_is_refused(
    tmp_path: Path, materials: Materials, quick: list[list[str]]
) -> None:
    prompts = scenes.TASK.split()[0][:8]
    trainer = LatentActorCriticTrainer(tiny_backbone("dit"), steering.REWARD, prompts, tiny_config())
    trainer.pretrain_critic()
    save_backbone(trainer.backbone, tmp_path / "model")
    out = tmp_path / "study"
    one = command(materials, out, "--seeds", "1", "--candidates", "1")
    steering.main([str(tmp_path / "model"), *one])
    assert sum("-seed0" in key for key in units.load(out)) == len(METHODS)
    with pytest.raises(ValueError, match="has a model without a critic"):
        steering.main([str(materials.folder / "shapes-dit"), *command(materials, tmp_path / "other")])
