"""The learning bench: paired statistics, resumable runs and the page of results."""

from __future__ import annotations

import json
import time
from contextlib import nullcontext
from dataclasses import replace
from itertools import pairwise, product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tiny_backbones import barely_trained

from bench.learning import __main__ as command
from bench.learning import page, runs, tables, units
from bench.learning.analysis import area, common_budget, final, images, paired, reached, seconds
from bench.learning.arms import critic_weighted, group_relative, latent_critic
from bench.learning.claims import AS_CHOSEN, CLAIMS, Claim
from bench.learning.dual_encoder import train_dual_encoder
from bench.learning.problems import BUDGET_QUANTILE, PROBLEMS, JpegBudget, Materials, Prompts
from bench.learning.runs import Arm, Budget, Point
from bench.learning.scales import SCALES
from bench.learning.tuning import Tuning
from lacfast.config import GRPO
from lacfast.config.sampling import Fixed
from lacfast.rewards.jpeg import jpeg_incompressibility
from lacfast.runtime.directories import whole_directory
from lacfast.tasks import scenes
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


def test_a_seed_that_a_slower_machine_ran_is_compared_over_as_many_images() -> None:
    curves = {
        "a": [line(1e-4, rate=2.0), line(1e-4, rate=6.0)],
        "b": [line(0.0, rate=1.0), line(0.0, rate=3.0)],
    }
    title, *rows = tables.comparison("equal time", seconds(0.0), curves, ["shapes_strict"])
    assert title == "At equal time (10 to 30):"
    assert rows[-1].startswith("| a minus b | +0.050 [+0.050, +0.050]"), "500 images of both seeds"


def test_a_level_is_reached_where_the_mean_of_the_seeds_first_has_it() -> None:
    curves = [line(1e-4), line(3e-4)]
    assert reached(curves, images, "shapes_strict", 0.5, 1000) == pytest.approx(500, abs=2)
    assert reached(curves, images, "shapes_strict", 0.7, 1000) == float("inf")


def test_an_arm_is_told_when_it_has_what_another_ends_with() -> None:
    rows = list(tables.speed({"a": [line(3e-4)], "b": [line(1e-4)], "c": [line(1e-3)]}, "shapes_strict"))
    assert rows[2:] == ["| b | 0.500 | 334 images | 3.0 |", "| c | 1.400 | never |  |"]


def test_what_an_arm_that_fell_apart_ends_with_is_there_before_any_image() -> None:
    rows = list(tables.speed({"a": [line(3e-4)], "b": [line(-3e-4)]}, "shapes_strict"))
    assert rows[2:] == ["| b | 0.100 | 0 images |  |"]


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
def test_the_arms_of_a_claim_make_equal_images_per_iteration_unless_chosen_elsewhere(name: str) -> None:
    for backbone in CLAIMS[name].budgets:
        arms = CLAIMS[name].arms(backbone)
        # What another section chose for each arm need not be alike.
        sizes = {arm.config.batch_size for arm in arms.values()}
        assert len(sizes) == 1 or CLAIMS[name].tuning == AS_CHOSEN
        assert set(CLAIMS[name].metrics[:1]) <= {*PROBLEMS[CLAIMS[name].problem].judges}


@pytest.fixture(scope="module")
def materials(tmp_path_factory: pytest.TempPathFactory) -> Materials:
    """Barely trained models: a run does not care."""
    folder = tmp_path_factory.mktemp("materials")
    with whole_directory(folder / "shapes-dit") as target:
        save_pretrained(barely_trained(), target)
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
        tuning=Tuning(rates=(0.5, 1.0)),
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
    assert "Milliseconds per image: latent critic " in text
    assert "Of the rewards' variance critics explain at the end: latent critic " in text
    assert (tmp_path / "docs" / "results" / "baselines-dit.png").stat().st_size > 10_000


def record(results: Path, claim: str, arm: str, last: float, *, seeds: int) -> None:
    """Runs of an arm on the DiT that rise in a straight line."""
    for seed in range(seeds):
        points = [
            Point(count, 0, 0.01 * count, dict.fromkeys(CLAIMS[claim].metrics, score))
            for count, score in ((0, 0.4), (8_000, last))
        ]
        unit = runs.described(points, seed=seed, policy_learning_rate=3e-4, batch_size=48)
        units.write(results / claim / "dit", f"{tables.key_start(arm)}seed{seed}", unit)


@pytest.fixture
def no_curves(monkeypatch: pytest.MonkeyPatch) -> None:
    """They take a second each; test_a_claim_is_tuned_run_resumed_and_reported looks at some."""
    monkeypatch.setattr(page.figures, "draw", lambda *_: None)


@pytest.mark.usefixtures("no_curves")
def test_a_study_of_one_seed_is_shown_and_not_judged(tmp_path: Path) -> None:
    for arm, last in {"critic-weighted NFT": 0.7, "GRPO": 0.5}.items():
        record(tmp_path / "learning", "objectives", arm, last, seeds=1)
    page.write(tmp_path / "learning", tmp_path / "results.md")
    text = (tmp_path / "results.md").read_text()
    assert "## objectives, dit" in text
    assert "| GRPO | 0.500 |" in text
    assert "## In short" not in text
    for arm, last in {"latent critic": 0.7, "GRPO": 0.5}.items():
        record(tmp_path / "learning", "baselines", arm, last, seeds=2)
    page.write(tmp_path / "learning", tmp_path / "results.md")
    assert "## In short" in (tmp_path / "results.md").read_text()
    assert (tmp_path / "results" / "overview.png").stat().st_size > 10_000


def test_an_arm_that_learned_more_or_only_in_another_tuned_claim_is_shown_by_that(
    tmp_path: Path,
) -> None:
    for arm, last in {"critic-weighted NFT": 0.7, "GRPO": 0.5, "DDPO": 0.6}.items():
        record(tmp_path, "objectives", arm, last, seeds=CLAIMS["objectives"].seeds - 1)
    for arm, last in {"latent critic": 0.6, "GRPO": 0.55, "DDPO": 0.55}.items():
        record(tmp_path, "baselines", arm, last, seeds=CLAIMS["baselines"].seeds)
    found = tables.at_best(tmp_path, CLAIMS, "objectives", "dit")
    ends = {arm: {points[-1].scores["shapes_strict"] for points in curves} for arm, curves in found.items()}
    assert ends == {"critic-weighted NFT": {0.7}, "latent critic": {0.6}, "GRPO": {0.55}, "DDPO": {0.6}}
    assert {len(curves) for curves in found.values()} == {4}


def test_an_arm_that_another_claim_has_for_fewer_seeds_is_compared_over_those(tmp_path: Path) -> None:
    for arm in ("critic-weighted NFT", "DiffusionNFT"):
        record(tmp_path, "objectives", arm, 0.7, seeds=4)
    record(tmp_path, "baselines", "GRPO", 0.6, seeds=3)
    found = tables.at_best(tmp_path, CLAIMS, "objectives", "dit")
    assert {arm: len(curves) for arm, curves in found.items()} == dict.fromkeys(found, 3)
    assert "GRPO" in found
    record(tmp_path, "matching", "AWM", 0.6, seeds=2)
    assert tables.at_best(tmp_path, CLAIMS, "objectives", "dit", ("AWM",)) == found, "no arm of that claim"


def test_a_critic_that_was_taught_before_is_told_apart() -> None:
    taught = [
        Point(images, 0, 2.0, {"explained_variance": known}) for images, known in ((0, 0), (0, 0.4), (8, 0.2))
    ]
    groups = [Point(0, 0, 0.0, {}), Point(8, 0, 1.0, {})]
    told = tables.explained({"taught": [taught], "groups": [groups]})
    assert told.endswith("at the end: taught 0.20 to 0.20, before training 0.40 to 0.40.")
    assert tables.explained({"groups": [groups]}) == ""
    assert tables.time_per_image({"taught": [taught]}) == "Milliseconds per image: taught 250.0."


@pytest.mark.usefixtures("no_curves")
def test_the_page_opens_with_methods_and_without_controls(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: dict[str, Any] = {}
    monkeypatch.setattr(page.figures, "overview", lambda studies, path: drawn.update(studies))
    for arm, last in {"critic-weighted NFT": 0.7, "DiffusionNFT": 0.65, "prompt history": 0.0}.items():
        record(tmp_path, "proxy-nft", arm, last, seeds=2)
    record(tmp_path, "proxy", "GRPO", 0.55, seeds=2)
    page.write(tmp_path, tmp_path / "results.md")
    opening, sections = (tmp_path / "results.md").read_text().split("## proxy-nft, dit")
    assert "| GRPO | 0.550 |" in opening, "another claim on the problem has it"
    _, shown, timed = drawn["proxy-nft, dit"]
    assert set(shown) - set(timed) == {"GRPO"}, "of another claim's runs the seconds are another machine's"
    assert "| prompt history |" not in opening
    assert "| prompt history |" in sections


def test_the_conclusion_counts_verdicts_and_not_what_cannot_be_judged() -> None:
    cells = [
        "+0.1 [+0.0, +0.2] ahead",
        "-0.1 [-0.2, +0.1] undecided",
        "+0.1 too few seeds",
        "",
        "-0.1 [-0.2, -0.1] behind",
    ]
    assert page.counted([*cells, cells[0]]) == "ahead in 2, undecided in 1, behind in 1 of 4"


def test_an_arm_whose_runs_another_claim_has_is_compared_and_not_run_again(tmp_path: Path) -> None:
    levels = CLAIMS["levels"]
    assert levels.runs_of["DiffusionNFT"] == ("objectives", "DiffusionNFT")
    wanted = {job.key for job in command.jobs(levels, tmp_path / "levels" / "dit", "dit")}
    assert "prompt-history-seed0" in wanted
    assert not [key for key in wanted if key.startswith("diffusionnft")]
    record(tmp_path, "objectives", "DiffusionNFT", 0.7, seeds=2)
    record(tmp_path, "objectives", "critic-weighted NFT", 0.5, seeds=2)
    assert not tables.paired_curves(tmp_path, "levels", levels, "dit"), "objectives has that section"
    record(tmp_path, "levels", "critic with replay", 0.6, seeds=2)
    found = tables.paired_curves(tmp_path, "levels", levels, "dit")
    ends = {arm: curves[0][-1].scores["shapes_strict"] for arm, curves in found.items()}
    assert ends == {"critic-weighted NFT": 0.5, "DiffusionNFT": 0.7, "critic with replay": 0.6}
    (lead,) = tables.leads(found, levels)
    assert lead[1] == "critic-weighted NFT minus critic with replay", "the other pair counts in objectives"


def test_some_arms_of_a_claim_run_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []
    monkeypatch.setattr(
        command, "perform", lambda name, backbone, *_, arms, **__: ran.append(f"{name} {arms}")
    )
    monkeypatch.setattr(page, "write", lambda *_: None)
    command.main(["joint", "--arms", "two heads", "--out", str(tmp_path)])
    assert ran == ["joint ['two heads']"]
    with pytest.raises(SystemExit):
        command.main(["joint", "--arms", "two hands", "--out", str(tmp_path)])
    monkeypatch.undo()
    keys: list[str] = []
    monkeypatch.setattr(command.units, "begun", lambda study, key: keys.append(key) or nullcontext(False))
    command.perform("joint", "dit", Materials(tmp_path), float("inf"), results=tmp_path, arms=["two heads"])
    assert keys == [f"two-heads-seed{seed}" for seed in range(CLAIMS["joint"].seeds)]


def test_seconds_of_another_claims_runs_are_not_compared() -> None:
    with pytest.raises(ValueError, match="another machine's"):
        replace(CLAIMS["levels"], reward_costs=(0.0,))


OTHERS = [
    pytest.param(name, arm, backbone, id=f"{name}-{arm}-{backbone}")
    for name, claim in CLAIMS.items()
    for arm in claim.runs_of
    for backbone in claim.budgets
]


@pytest.mark.parametrize(("name", "arm", "backbone"), OTHERS)
def test_runs_of_another_claim_are_of_the_arms_own_settings(name: str, arm: str, backbone: Any) -> None:
    claim, problem = CLAIMS[name], PROBLEMS[CLAIMS[name].problem]
    owner = CLAIMS[claim.runs_of[arm][0]]
    ours, budget = claim.arms(backbone)[arm], claim.budgets[backbone]
    assert (problem.task, budget) == (PROBLEMS[owner.problem].task, owner.budgets[backbone])
    tuned = claim.tuning.settings(ours)
    settings = [units.changed(claim.tuning.applied(ours, one, budget.images).config) for one in tuned]
    found = tables.reported(command.RESULTS, name, claim, backbone, [arm])[arm]
    for unit in found:
        assert unit["settings"] in settings
        assert unit["rewards"] == (ours.rewards or problem.rewards)
        assert set(claim.metrics) <= unit["points"][-1]["scores"].keys()
    assert {unit["seed"] for unit in found} >= set(range(claim.seeds))


def tournament() -> Claim:
    """Two arms, six settings of each, of which two are tried for twice as long."""
    tuning = Tuning(rates=(0.5, 1.0, 2.0), batches=(1.0, 0.5), rounds=(1 / 4, 1 / 2), falls=True)
    return replace(small_claim(), budgets={"dit": replace(SMALL, images=64)}, tuning=tuning)


def test_every_arm_is_tuned_by_halving_with_as_many_images(tmp_path: Path) -> None:
    claim, study = tournament(), tmp_path / "baselines" / "dit"
    worth = dict(zip(product((16, 8), (1.5e-4, 3e-4, 6e-4)), (0.3, 0.6, 0.1, 0.7, 0.2, 0.1), strict=True))

    def perform(job: command.Job) -> None:
        """A setting's score is what it is worth, the other way round in the second round."""
        config = job.arm.config
        score = worth[config.batch_size, config.ppo.policy_learning_rate]
        score = 1 - score if "round2" in job.key else score
        points = [Point(count, 0, 0.0, {"shapes_strict": score}) for count in (0, job.budget.images)]
        units.write(study, job.key, runs.described(points, seed=job.seed))

    wanted = list(command.jobs(claim, study, "dit"))
    assert {job.key.partition("/")[2] for job in wanted} == {
        f"round1/{arm}-{size}-{rate}"
        for arm, size, rate in product(("latent-critic", "grpo"), (16, 8), ("0.00015", "0.0003", "0.0006"))
    }, "what follows from curves waits for them"
    made = []
    for job in command.jobs(claim, study, "dit"):
        perform(job)
        made.append(job)
    assert [job.budget.images for job in made] == [16] * 12 + [32] * 4 + [64] * 4
    assert {job.key for job in made[12:16]} == {
        f"tuning/round2/{arm}-{setting}"
        for arm, setting in product(("latent-critic", "grpo"), ("16-0.0003", "8-0.00015"))
    }
    finals = made[16:]
    assert [job.key for job in finals] == [
        *("latent-critic-seed0", "grpo-seed0", "latent-critic-seed1", "grpo-seed1")
    ]
    for job in finals:
        config = job.arm.config
        assert (config.batch_size, config.ppo.policy_learning_rate) == (16, 3e-4), (
            "the best of the last round"
        )
        assert (config.iterations, config.ppo.final_learning_rate) == (4, 0.0), "it falls over the whole run"


@pytest.mark.usefixtures("no_curves")
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


def test_an_end_is_judged_by_what_it_makes_of_as_much_compute(materials: Materials) -> None:
    arm = small(Arm(config=critic_weighted("dit")))
    arm = replace(arm, config=replace(arm.config, sampler=replace(arm.config.sampler, window=Fixed((0, 2)))))
    arm = replace(arm, config=replace(arm.config, sampler=replace(arm.config.sampler, num_steps=4)))
    budget = replace(SMALL, images=16, seconds=0.0)
    points = runs.run(PROBLEMS["shapes"], "dit", arm, budget, materials, seed=0, more_compute=True)
    assert points is not None
    first, last = points[0], points[-1]
    assert not first.sampled
    assert {use: scores["nfe"] for use, scores in last.sampled.items()} == {
        f"{use}{how}": nfe
        for how in ("", ", ODE")
        for use, nfe in (
            ("one image", 4),
            ("3 times the steps", 12),
            ("steered by the critic", 14),
            ("best of 3 by the reward", 12),
        )
    }
    called = {use for use, scores in last.sampled.items() if scores["reward_calls"]}
    assert called == {"best of 3 by the reward", "best of 3 by the reward, ODE"}
    kept = runs.curve(json.loads(json.dumps(runs.described(points))))
    assert kept == points, "a study keeps it"


def test_the_critics_images_are_compared_with_those_that_call_no_reward() -> None:
    def end(**scores: float) -> Point:
        sampled = {
            use.replace("_", " "): {"shapes_strict": score, "nfe": 24.0, "reward_calls": float("best" in use)}
            for use, score in scores.items()
        }
        return Point(1_000, 0, 0.0, {}, sampled)

    ours = [[end(one_image=0.6, steered_by_the_critic=0.8 + 0.01 * seed)] for seed in range(3)]
    theirs = [[end(one_image=0.7, best_of_3_by_the_reward=0.9)] for _ in range(3)]
    rows = list(tables.more_compute({"critic": ours, "groups": theirs}, ["shapes_strict"]))
    assert rows[4] == "| critic | one image | 0.600 | 24 | 0 |"
    assert rows[7] == "| groups | best of 3 by the reward | 0.900 | 24 | 1 |"
    (lead,) = rows[8:]
    assert lead.startswith("| critic minus groups | steered by the critic minus one image | +0.110 [+0.100,")
    plain = [[replace(ours[0][0], sampled={})]]
    assert not list(tables.more_compute({"critic": plain, "groups": plain}, ["shapes_strict"]))


def test_a_scale_changes_sizes_and_nothing_of_what_is_compared() -> None:
    scale, claim = SCALES["gpu"], CLAIMS["baselines"]
    larger = scale.claim(claim)
    assert (larger.tuning, larger.metrics, larger.problem) == (claim.tuning, claim.metrics, claim.problem)
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
