"""The learning bench: paired statistics, resumable runs and the page of results."""

from __future__ import annotations

import time
from dataclasses import replace
from itertools import pairwise, product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from bench.learning import __main__ as command
from bench.learning import page, runs, tables, units
from bench.learning.analysis import area, common_budget, final, images, paired, seconds
from bench.learning.arms import group_relative, latent_critic
from bench.learning.claims import CLAIMS, Claim
from bench.learning.dual_encoder import train_dual_encoder
from bench.learning.problems import BUDGET_QUANTILE, PROBLEMS, JpegBudget, Materials, Prompts
from bench.learning.runs import Arm, Budget, Point
from bench.learning.scales import SCALES
from lacfast.config import GRPO
from lacfast.rewards.jpeg import jpeg_incompressibility
from lacfast.runtime.directories import whole_directory
from lacfast.tasks import scenes
from lacfast.tasks.pretraining import pretrain
from lacfast.tasks.storage import save_pretrained


def line(slope: float, *, rate: float = 1.0, start: float = 0.4) -> list[Point]:
    """A curve whose score rises linearly: `rate` seconds per 100 images."""
    scores = {"shapes_gold": 0.0, "diversity": 0.0}
    return [
        Point(count, 8 * count, rate * count / 100, scores | {"shapes_strict": start + slope * count})
        for count in (0, 500, 1000)
    ]


def test_scores_are_interpolated_at_equal_cost() -> None:
    curve = line(1e-4, rate=2.0)
    assert final(curve, images, "shapes_strict", 750) == pytest.approx(0.475)
    assert final(curve, seconds(0.0), "shapes_strict", 10) == pytest.approx(0.45)
    # 0.01 s per image: 1,000 images take 20 + 10 s, so 15 s are 500 images.
    assert final(curve, seconds(0.01), "shapes_strict", 15) == pytest.approx(0.45)
    assert area(curve, images, "shapes_strict", 1000) == pytest.approx(0.45)


def test_arms_are_compared_where_all_of_them_have_been() -> None:
    assert common_budget([line(0.0, rate=1.0), line(0.0, rate=3.0)], seconds(0.0)) == 10


def test_the_bootstrap_interval_covers_the_mean_of_its_pairs_95_times_in_100() -> None:
    random, covered = np.random.default_rng(0), 0
    for _ in range(200):
        sample = random.normal(0.3, 1.0, size=30)
        difference = paired(sample.tolist(), [0.0] * 30)
        covered += difference.low <= 0.3 <= difference.high
    assert 0.88 <= covered / 200 <= 0.99


@pytest.mark.parametrize(
    ("first", "verdict"),
    [
        ([0.5, 0.6, 0.7], "ahead"),
        ([0.0, 0.1, 0.1], "behind"),
        ([0.1, 0.4, 0.35], "undecided"),
        ([0.5, 0.6], "too few seeds"),
    ],
)
def test_a_lead_is_claimed_only_when_the_interval_excludes_zero(first: list[float], verdict: str) -> None:
    assert paired(first, [0.2, 0.3, 0.35][: len(first)]).verdict == verdict


def test_one_pair_has_no_interval() -> None:
    with pytest.raises(ValueError, match="run more seeds"):
        paired([1.0], [0.0])


@pytest.mark.parametrize("problem", PROBLEMS.values(), ids=list(PROBLEMS))
def test_prompts_that_train_choose_and_report_are_disjoint(problem: Any) -> None:
    prompts = Prompts.of(problem.task)
    sets = [{prompt.text for prompt in part} for part in (prompts.train, prompts.tuning, prompts.held_out)]
    assert sum(map(len, sets)) == len(set.union(*sets)) == len(problem.task.prompts())


@pytest.mark.parametrize("name", CLAIMS)
def test_the_arms_of_a_claim_make_equal_images_per_iteration(name: str) -> None:
    for backbone in CLAIMS[name].budgets:
        arms = CLAIMS[name].arms(backbone)
        assert len({arm.config.batch_size for arm in arms.values()}) == 1
        assert set(CLAIMS[name].metrics[:1]) <= {*PROBLEMS[CLAIMS[name].problem].judges}


@pytest.fixture(scope="module")
def materials(tmp_path_factory: pytest.TempPathFactory) -> Materials:
    """Barely trained models: a run does not care."""
    folder = tmp_path_factory.mktemp("materials")
    with whole_directory(folder / "shapes-dit") as target:
        save_pretrained(pretrain("dit", steps=2), target)
    with whole_directory(folder / "shapes-encoder-1") as target:
        train_dual_encoder(seed=1, steps=2).save_pretrained(target)
    return Materials(folder)


def small(arm: Arm) -> Arm:
    sampler = replace(arm.config.sampler, num_steps=3, window=None)
    config = replace(arm.config, batch_size=16, sampler=sampler)
    if config.advantages.uses_critic:
        pretrain = replace(config.pretrain, iterations=1, held_out_samples=16)
        config = replace(config, pretrain=pretrain)
    return replace(arm, config=config)


SMALL = Budget(images=48, seconds=0.01, judged_every=48, samples=64)


def small_claim() -> Claim:
    return replace(
        CLAIMS["baselines"],
        arms=lambda backbone: {
            "latent critic": small(Arm(config=latent_critic(backbone))),
            "GRPO": small(Arm(config=group_relative(backbone, GRPO()))),
        },
        budgets={"dit": SMALL},
        grid=(0.5, 1.0),
        seeds=2,
    )


def test_a_claim_is_tuned_run_resumed_and_reported(
    tmp_path: Path, materials: Materials, monkeypatch: pytest.MonkeyPatch
) -> None:
    claim, results = small_claim(), tmp_path / "learning"
    monkeypatch.setitem(command.CLAIMS, "baselines", claim)
    command.perform("baselines", "dit", materials, deadline=float("inf"), results=results)
    found = units.load(results / "baselines" / "dit")
    assert list(found) == [
        *("grpo-seed0", "grpo-seed1", "latent-critic-seed0", "latent-critic-seed1"),
        *("tuning/grpo-0.00015", "tuning/grpo-0.0003"),
        *("tuning/latent-critic-0.00015", "tuning/latent-critic-0.0003"),
    ]
    assert [path.name for path in (results / "baselines").rglob("*.*")] == ["dit.json"], "one file per study"
    critic, grpo = (runs.curve(found[f"{arm}-seed0"]) for arm in ("latent-critic", "grpo"))
    assert critic[0].scores["shapes_strict"] == grpo[0].scores["shapes_strict"], "one base, common noise"
    assert critic[1].images == 32, "value pretraining's images count: one rollout and the held-out one"
    assert {"diversity", "off_palette", "feature_distance", "background"} <= critic[0].scores.keys()
    assert all(after.seconds > before.seconds for before, after in pairwise(critic))

    ran = []
    monkeypatch.setattr(runs, "run", lambda *arguments, **named: ran.append(arguments))
    command.perform("baselines", "dit", materials, deadline=float("inf"), results=results)
    assert ran == [], "what is there is not run again"

    page.write(results, tmp_path / "docs" / "results.md")
    text = (tmp_path / "docs" / "results.md").read_text()
    assert "| GRPO |" in text
    assert "Against GRPO and DDPO the latent critic ends ahead in 0" in text, "two seeds decide nothing"
    kept = found["grpo-seed0"]
    assert kept["settings"]["advantages"] == {"estimator": {"choice": "grpo", "std": "global"}}, (
        "a curve says what its arm was told"
    )
    assert kept["rewards"] == {"shapes": 1.0}
    rate = kept["policy_learning_rate"]
    assert "tuned over 0.00015, 0.0003; chosen: " in text
    assert f"{rate:g} (GRPO)" in text
    (lead,) = [line for line in text.splitlines() if line.startswith("| latent critic minus GRPO")][:1]
    (short,) = [line for line in text.splitlines() if "| shapes_strict | latent critic minus GRPO" in line]
    assert short.split(" | ")[3] == lead.split(" | ")[1], "the summary repeats the section's lead"
    scored = len(claim.metrics) + 1
    assert lead.count("[") == scored, "final scores and the area have intervals of their own"
    assert "equal time, reward of 100 ms per image" in text
    assert (tmp_path / "docs" / "results" / "baselines-dit.png").stat().st_size > 10_000


def test_the_conclusion_counts_verdicts_and_not_what_cannot_be_judged() -> None:
    cells = [
        "+0.1 [+0.0, +0.2] ahead",
        "-0.1 [-0.2, +0.1] undecided",
        "+0.1 too few seeds",
        "",
        "-0.1 [-0.2, -0.1] behind",
    ]
    assert page.counted([*cells, cells[0]]) == "ahead in 2, undecided in 1, behind in 1 of 4"


def test_a_claim_shows_the_runs_that_another_lends_once_it_has_one_of_its_own(tmp_path: Path) -> None:
    point = Point(0, 0, 0.0, dict.fromkeys(CLAIMS["objectives"].metrics, 0.5))
    points = [point, replace(point, images=14_000, seconds=60.0)]
    docs = tmp_path / "docs" / "results.md"

    def run(claim: str, arm: str, seed: int) -> None:
        unit = runs.described(points, seed=seed, policy_learning_rate=3e-4)
        units.write(tmp_path / "learning" / claim / "dit", f"{tables.key_start(arm)}seed{seed}", unit)

    for arm, seed in product(CLAIMS["baselines"].arms("dit"), (0, 1, 2)):
        run("baselines", arm, seed)
    page.write(tmp_path / "learning", docs)
    assert "## objectives" not in docs.read_text(), "lent runs alone are another section's"
    for seed in (0, 1):
        run("objectives", "DiffusionNFT", seed)
    page.write(tmp_path / "learning", docs)
    short, _, section = docs.read_text().partition("## objectives, dit")
    assert "paired seeds: 2" in section
    assert "Not run yet: AWM, critic-weighted NFT." in section
    assert section.count("| latent critic minus GRPO |") == 1
    assert "| objectives, dit | shapes_strict | latent critic minus DiffusionNFT |" in short
    assert "| objectives, dit | shapes_strict | latent critic minus GRPO |" not in short
    assert "- objectives, dit: 2 of 9 runs" in section


def test_a_section_names_the_arms_that_have_not_run(tmp_path: Path) -> None:
    study = tmp_path / "learning" / "hacking" / "dit"
    arms = list(CLAIMS["hacking"].arms("dit"))
    point = Point(0, 0, 0.0, dict.fromkeys(CLAIMS["hacking"].metrics, 0.5))
    points = [point, replace(point, images=6_000, seconds=60.0)]
    docs = tmp_path / "docs" / "results.md"
    for arm in arms[:2]:
        for seed in (0, 1):
            unit = runs.described(points, seed=seed, policy_learning_rate=3e-4)
            units.write(study, f"{tables.key_start(arm)}seed{seed}", unit)
        page.write(tmp_path / "learning", docs)
        assert ("## hacking, dit" in docs.read_text()) == (arm == arms[1]), "one arm compares with nothing"
    assert f"Not run yet: {', '.join(arms[2:])}." in docs.read_text()


# With the second budget the run has had its images before its last judgement is due.
@pytest.mark.parametrize(("images", "judged_every", "iterations"), [(80, 16, 3), (60, 72, 3)])
def test_a_run_that_its_deadline_stops_goes_on_where_it_was(
    images: int,
    judged_every: int,
    iterations: int,
    tmp_path: Path,
    materials: Materials,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    arm, problem = small(Arm(config=latent_critic("dit"))), PROBLEMS["shapes"]
    budget = replace(SMALL, images=images, judged_every=judged_every, seconds=0.0)
    kept = tmp_path / "kept"
    whole = runs.run(problem, "dit", arm, budget, materials, seed=0)
    assert whole is not None
    # Every call does one iteration: the clock stands at the deadline from the second look on.
    calls, looks = 0, iter(())
    # The clock of this module alone: threads that score wait by the real one.
    clock = SimpleNamespace(monotonic=lambda: next(looks, 2.0), process_time=time.process_time)
    monkeypatch.setattr(runs, "time", clock)
    points = None
    while points is None:
        assert (calls == 0) or kept.exists()
        calls, looks = calls + 1, iter((0.0,))
        points = runs.run(problem, "dit", arm, budget, materials, seed=0, deadline=1.0, unfinished=kept)
    assert calls == iterations
    assert not kept.exists()
    assert [(point.images, point.scores) for point in points] == [
        (point.images, point.scores) for point in whole
    ]


def test_a_scale_changes_sizes_and_nothing_of_what_is_compared() -> None:
    scale, claim = SCALES["gpu"], CLAIMS["baselines"]
    larger = scale.claim(claim)
    assert (larger.grid, larger.metrics, larger.problem) == (claim.grid, claim.metrics, claim.problem)
    assert larger.seeds == 2 * claim.seeds
    arms = larger.arms("dit")
    assert arms.keys() == claim.arms("dit").keys()
    assert len({arm.config.batch_size for arm in arms.values()}) == 1
    task = scale.problem(PROBLEMS["shapes"]).task
    assert (task.name, task.image_size) == ("shapes-64", 64)
    assert {prompt.text for prompt in task.prompts()} == {prompt.text for prompt in scenes.TASK.prompts()}
    assert SCALES["cpu"].config(claim.arms("dit")["GRPO"].config, 32) == claim.arms("dit")["GRPO"].config


@pytest.mark.parametrize("scale", SCALES)
def test_every_claim_has_its_arms_at_every_scale(scale: str) -> None:
    for claim in CLAIMS.values():
        larger = SCALES[scale].claim(claim)
        for backbone in claim.budgets:
            assert larger.arms(backbone).keys() == claim.arms(backbone).keys()


def test_a_budget_for_the_file_asks_for_no_smaller_one() -> None:
    reward = JpegBudget.of(scenes.TASK)
    flat, noise = torch.full((1, 3, 32, 32), 0.5), torch.rand(1, 3, 32, 32, generator=torch.Generator())
    images = torch.cat([flat, noise])
    sizes = jpeg_incompressibility(images, [], [])
    assert sizes[0] < reward.kilobytes < sizes[1]
    assert reward(images, [], []).tolist() == [0.0, pytest.approx(float(reward.kilobytes - sizes[1]))]
    pictures = torch.from_numpy(scenes.TASK.draw(scenes.TASK.prompts() * 4, np.random.default_rng(3)))
    kept = reward(pictures, [], []) == 0
    assert float(kept.float().mean()) == pytest.approx(BUDGET_QUANTILE, abs=0.05)


def test_every_problem_names_rewards_that_exist(materials: Materials) -> None:
    for problem in PROBLEMS.values():
        names = [*problem.rewards, *problem.judges]
        assert all(name.startswith("similarity") or materials.reward(name, problem.task) for name in names)
    assert scenes.TASK.name == "shapes"
