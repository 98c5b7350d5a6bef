"""Noise of gradients: without bias, of the very gradient that an update takes, and told on the page."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_backbones import barely_trained

from bench.learning import climb_section, gradient_climb, gradient_noise, gradients_section, units
from bench.learning.gradient_noise import REFERENCE, SMOKE, noise_of
from bench.learning.problems import Materials
from lacfast.learning.batches import PolicySource
from lacfast.runtime.directories import whole_directory
from lacfast.tasks.storage import save_pretrained


def test_signal_and_noise_of_gaussians_are_found_within_the_error() -> None:
    generator = torch.Generator().manual_seed(0)
    mean = torch.full((50,), 0.1)
    gradients = mean + 2 * torch.randn(4_000, 50, generator=generator)
    found = noise_of(gradients, mean.expand_as(gradients) + 0.5 * torch.randn(4_000, 50, generator=generator))
    assert found.noise == pytest.approx(50 * 4, rel=0.02)
    assert abs(found.signal - 0.5) < 3 * found.error
    # U-statistic: 4 |mean|^2 sigma^2 / n + 2 d sigma^4 / n^2.
    assert found.error == pytest.approx(math.sqrt(4 * 0.5 * 4 / 4_000 + 2 * 50 * 16 / 4_000**2), rel=0.5)
    assert found.alignment == pytest.approx(1, abs=0.1)
    plain = float(gradients.mean(dim=0).square().sum())
    assert plain > found.signal + 2 * 50 * 4 / 4_000 / 3


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gradients")
    with whole_directory(folder / "shapes-dit") as target:
        save_pretrained(barely_trained(), target)
    found = folder / "results" / "gradients" / "shapes-dit"
    gradient_noise.run(Materials(folder), "shapes", "dit", [0], SMOKE, found)
    return found


def test_a_study_has_every_baseline_at_every_trained_step_and_stage(study: Path) -> None:
    found = units.load(study)
    for stage in SMOKE.stages:
        noise = found[f"{stage}-seed0"]["noise"]
        assert all(len(steps) == 6 for steps in noise.values())
        # The last step's value is not used again, so GAE leaves its advantage as it is.
        last: dict[str, Any] = {name: steps[-2] for name, steps in noise.items()}
        assert last["critic, lambda 0"]["noise"] == pytest.approx(last[REFERENCE]["noise"])
        assert noise["critic, lambda 0"][0]["noise"] != pytest.approx(noise[REFERENCE][0]["noise"])


def test_the_page_tells_what_each_baseline_takes_away(study: Path) -> None:
    (section,) = gradients_section.sections(study.parents[1])
    assert "## gradients, shapes-dit" in section
    assert "| nothing | 1.00 | 1.00 | 1.00 | 1.00 | 1.00 | 1.00 |  |" in section
    assert "**After 8 images of PPO.**" in section


@pytest.mark.parametrize("objective", gradient_noise.OBJECTIVES)
def test_sketched_scores_are_the_update_s_own_gradient(study: Path, objective: str) -> None:
    trainer = gradient_noise.trainer_of(Materials(study.parents[2]), "shapes", "dit", SMOKE, 0, objective)
    rollout = trainer.collect(trainer.prompts.take(range(6)), gradient_noise.MEASURED_IDS)
    assert rollout is not None
    # A model that has learnt nothing may get the same reward for all six, and then there is no gradient.
    rollout = rollout.with_rewards({name: torch.linspace(0.0, 1.0, 6) for name in rollout.rewards})
    scores = gradient_noise.sketched_scores(trainer, rollout)
    given = trainer.advantages(rollout)
    update = trainer.learner.policy_update
    source = PolicySource(rollout, given, update.tables.timesteps)
    update.gradient(source.batch(source.pairs, torch.ones(())))
    gradients = [weight.grad for weight in trainer.backbone.policy_parameters()]
    whole = gradient_noise.sketch(gradients)
    mine = (scores * given.policy.unsqueeze(-1)).mean(dim=(0, 1))
    torch.testing.assert_close(mine, whole, rtol=1e-3, atol=1e-4 * float(whole.abs().max()))
    # Sketches of 4,096 numbers keep a squared norm within some per cent.
    norm = sum(float(gradient.square().sum()) for gradient in gradients)
    assert float(whole.square().sum()) == pytest.approx(norm, rel=0.15)


def test_a_forward_process_is_measured_where_it_is_linear_and_without_gae(
    tmp_path: Path, study: Path
) -> None:
    found = tmp_path / "learning" / "gradients" / "shapes-dit-nft"
    gradient_noise.run(Materials(study.parents[2]), "shapes", "dit", [0], SMOKE, found, objective="nft")
    noise = units.load(found)["base-seed0"]["noise"]
    assert units.load(found).keys() == {units.SETTINGS, "base-seed0"}
    assert all(len(steps) == 8 + 1 for steps in noise.values())
    assert not any("lambda" in name for name in noise)
    (section,) = gradients_section.sections(tmp_path / "learning")
    assert "by DiffusionNFT" in section
    assert "change the expected gradient" in section
    (line,) = [line for line in section.splitlines() if line.startswith(f"| {REFERENCE} |")]
    assert line.split("|")[-3].strip() == "", "the reference is aligned with itself"


def test_what_a_signal_tells_is_left_out_where_it_is_not_seen() -> None:
    def unit(error: float) -> dict[str, Any]:
        whole = {"signal": 1.0, "error": error, "noise": 5.0, "alignment": 0.7}
        return {"noise": {REFERENCE: [whole], "critic, lambda 0": [whole | {"error": 0.1}]}}

    aligned = gradients_section._aligned
    assert aligned([unit(0.1)], "critic, lambda 0") == "0.70"
    assert aligned([unit(1.0)], "critic, lambda 0") == ""
    needed = gradients_section._needed
    assert needed([unit(0.1)], REFERENCE) == "5", "noise 5 of a trajectory, signal 1"
    assert needed([unit(1.0)], REFERENCE) == ""
    assert needed([unit(0.9)] * 4, REFERENCE) == "5", "four seeds have half the error"


def test_a_climb_moves_along_the_gradient_and_comes_back(tmp_path: Path, study: Path) -> None:
    found = tmp_path / "learning" / "climb" / "shapes-dit"
    gradient_climb.run(Materials(study.parents[2]), "shapes", "dit", [0], SMOKE, 8, found)
    unit = units.load(found)["seed0"]
    assert unit["rise"].keys() == {"2 of the prompt", REFERENCE, "value"}
    assert all(len(rises) == 8 + 1 for rises in unit["rise"].values())
    assert any(rise["mean"] != 0 for rise in unit["rise"][REFERENCE])
    (section,) = climb_section.sections(tmp_path / "learning")
    assert "| critic |" in section


def test_a_move_has_its_length_and_lowers_the_loss() -> None:
    weights = [torch.full((3,), 2.0), torch.ones(4)]
    before = [weight.clone() for weight in weights]
    gradient = [torch.tensor([1.0, 0.0, -1.0]), torch.zeros(4)]
    with gradient_climb.moved(weights, gradient):
        change = torch.cat([now - then for now, then in zip(weights, before, strict=True)])
        assert float(change.norm()) == pytest.approx(gradient_climb.LENGTH * 4, rel=1e-4)
        assert float(change @ torch.cat(gradient)) < 0
    for now, then in zip(weights, before, strict=True):
        torch.testing.assert_close(now, then, rtol=0, atol=0)
