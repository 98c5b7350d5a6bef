"""Tables of docs/results.md: the arms' scores at equal cost, and the first one's leads over paired seeds."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from statistics import mean

from bench.learning import runs, units
from bench.learning.analysis import Cost, area, common_budget, final, images, paired, reached, seconds
from bench.learning.claims import Claim
from bench.learning.figures import Curves
from bench.learning.more_compute import STEERED, TIMES
from bench.learning.runs import Point
from lacfast.tasks.models import BackboneName

EXPLAINED = "explained_variance"
"""A critic's score, see Point.scores."""
Measure = tuple[Callable[[Sequence[Point], Cost, str, float], float], str]
"""What is compared: a function of a curve, and the metric that it reads."""


def key_start(arm: str) -> str:
    """What the keys of an arm's runs begin with."""
    return f"{arm.lower().replace(' ', '-')}-"


def units_of(found: Mapping[str, units.Unit], arm: str) -> list[units.Unit]:
    """The arm's runs of a study, those that tune aside."""
    return [unit for key, unit in found.items() if key.startswith(f"{key_start(arm)}seed")]


def reported(
    results: Path, name: str, claim: Claim, backbone: BackboneName, arms: Iterable[str]
) -> dict[str, list[units.Unit]]:
    """Arm -> its runs, those that tune aside, also where another claim has them; arms without one are left
    out."""
    places = {arm: claim.runs_of.get(arm, (name, arm)) for arm in arms}
    owners = {owner for owner, _ in places.values()}
    found = {owner: units.load(results / owner / backbone) for owner in owners}
    made = {arm: units_of(found[owner], theirs) for arm, (owner, theirs) in places.items()}
    return {arm: of_arm for arm, of_arm in made.items() if of_arm}


def _curves(
    results: Path, name: str, claim: Claim, backbone: BackboneName, arms: Iterable[str]
) -> dict[str, dict[int, list[Point]]]:
    """Arm -> seed -> curve, of those that have one."""
    found = reported(results, name, claim, backbone, arms)
    return {arm: {unit["seed"]: runs.curve(unit) for unit in made} for arm, made in found.items()}


def _common_seeds(curves: Mapping[str, Mapping[int, object]]) -> list[int]:
    return sorted(set.intersection(*(set(of_arm) for of_arm in curves.values())))


def paired_curves(results: Path, name: str, claim: Claim, backbone: BackboneName) -> Curves:
    """Arm -> curves of the seeds that every arm with a curve has, which alone can be compared.

    Empty without such a seed, without the claim's first arm, without another one, and where all runs are
    other claims', which compare them.
    """
    arms = list(claim.arms(backbone))
    found = _curves(results, name, claim, backbone, arms)
    if len(found) < 2 or arms[0] not in found or found.keys() <= claim.runs_of.keys():
        return {}
    seeds = _common_seeds(found)
    return {arm: [curves[seed] for seed in seeds] for arm, curves in found.items()} if seeds else {}


def at_best(
    results: Path,
    claims: Mapping[str, Claim],
    name: str,
    backbone: BackboneName,
    rivals: Sequence[str] = (),
) -> Curves:
    """A claim's paired curves, an arm with the runs of another tuned claim on its problem where those learned
    more, or where it has none here; then over the seeds of those, but for `rivals`, which are left out where
    they have fewer. Base model and noise of a seed are the same in all claims.

    Args:
        results: folder of the runs.
        claims: by name.
        name: of the claim.
        backbone: of the claim.
        rivals: arms that the claim has not and others may have.
    """
    claim = claims[name]
    best = dict(paired_curves(results, name, claim, backbone))
    if not best:
        return {}
    arms = list(dict.fromkeys([*claim.arms(backbone), *rivals]))
    own = _curves(results, name, claim, backbone, best)
    elsewhere = {
        other: _curves(results, other, rival, backbone, arms)
        for other, rival in claims.items()
        if other != name and rival.problem == claim.problem and rival.tuning.rounds
    }
    wanted = claim.arms(backbone).keys() - own.keys()
    lent = [found for curves in elsewhere.values() for arm, found in curves.items() if arm in wanted]
    seeds = _common_seeds(own)
    for found in lent:
        seeds = [seed for seed in seeds if seed in found] or seeds
    best = {arm: [curves[seed] for seed in seeds] for arm, curves in own.items()}
    for curves in elsewhere.values():
        for arm, found in curves.items():
            if found.keys() >= set(seeds):
                both = {"there": [found[seed] for seed in seeds]}
                both |= {"here": best[arm]} if arm in best else {}
                areas = {
                    place: mean(_scores(both, place, (area, claim.metrics[0]), images)) for place in both
                }
                best[arm] = both[max(areas, key=lambda place: areas[place])]
    return {arm: best[arm] for arm in arms if arm in best}


def comparable(results: Path, claims: Mapping[str, Claim]) -> Iterator[tuple[str, Claim, Curves]]:
    """Title, claim and curves of every claim and backbone with pairs enough for an interval."""
    for name, claim in claims.items():
        for backbone in claim.budgets:
            curves = paired_curves(results, name, claim, backbone)
            if curves and len(next(iter(curves.values()))) > 1:
                yield f"{name}, {backbone}", claim, curves


def summary(results: Path, claims: Mapping[str, Claim]) -> Iterator[str]:
    """Lines of a table: leads of the claims' first arms in the headline's metric; none without pairs."""
    found = comparable(results, claims)
    rows = [[title, *row] for title, claim, curves in found for row in leads(curves, claim)]
    if rows:
        columns = ["metric", "lead", "at the end, equal images", "area, equal images"]
        columns.append("area, equal time, free reward")
        yield _row("claim", columns)
        yield "|" + "---|" * (len(columns) + 1)
        yield from (_row(first, cells) for first, *cells in rows)


def comparison(title: str, cost: Cost, curves: Curves, metrics: Sequence[str]) -> Iterator[str]:
    """Scores at the end and over the budget, and the first arm's leads over each other one."""
    first, *others = curves
    measures: dict[str, Measure] = {metric: (final, metric) for metric in metrics}
    measures[f"area, {metrics[0]}"] = (area, metrics[0])
    budgets = [f"{budget:,.0f}" for budget in sorted(_budgets(curves, cost))]
    yield f"At {title} ({' to '.join(dict.fromkeys([budgets[0], budgets[-1]]))}):"
    yield ""
    yield _row("arm", measures)
    yield "|" + "---|" * (len(measures) + 1)
    start = [mean(points[0].scores[metric] for points in curves[first]) for metric in metrics]
    yield _row("base model", [*(f"{score:.3f}" for score in start), ""])
    for arm in curves:
        means = [mean(_scores(curves, arm, measure, cost)) for measure in measures.values()]
        yield _row(arm, [f"{score:.3f}" for score in means])
    if len(curves[first]) < 2:
        return
    for arm in others:
        leads = [_lead(curves, first, arm, measure, cost) for measure in measures.values()]
        yield _row(f"{first} minus {arm}", leads)


def time_per_image(curves: Curves) -> str:
    """What an image of each arm takes, reward and judging aside."""
    taken = {arm: mean(runs[-1].seconds / runs[-1].images for runs in made) for arm, made in curves.items()}
    return f"Milliseconds per image: {', '.join(f'{arm} {1000 * each:.1f}' for arm, each in taken.items())}."


def explained(curves: Curves) -> str:
    """What the critics explain of the rewards at the end, and before the first image that counts where they
    were taught before; empty without a critic."""
    told = []
    for arm, made in curves.items():
        ends = [points[-1].scores.get(EXPLAINED, 0.0) for points in made]
        if any(ends):
            told.append(f"{arm} {min(ends):.2f} to {max(ends):.2f}")
            before = [points[1].scores[EXPLAINED] for points in made if points[1].images == 0]
            if before:
                told[-1] += f", before training {min(before):.2f} to {max(before):.2f}"
    return f"Of the rewards' variance critics explain at the end: {'; '.join(told)}." if told else ""


def more_compute(curves: Curves, metrics: Sequence[str]) -> Iterator[str]:
    """Lines of a table: what every arm's last model makes of more compute, and how far the first arm's critic
    leads what the others make of as much without calls of the reward; none where nothing was measured."""
    first, *others = curves
    ends = {arm: [points[-1].sampled for points in of_arm] for arm, of_arm in curves.items()}
    if not all(sampled for of_arm in ends.values() for sampled in of_arm):
        return
    yield f"At the same end, up to {TIMES} times the compute per image:"
    yield ""
    yield _row("arm", ["an image is", *metrics, "NFE", "reward calls"])
    yield "|" + "---|" * (len(metrics) + 4)
    for arm, of_arm in ends.items():
        for use in of_arm[0]:
            means = {name: mean(sampled[use][name] for sampled in of_arm) for name in of_arm[0][use]}
            scores = [f"{means[metric]:.3f}" for metric in metrics]
            yield _row(arm, [use, *scores, f"{means['nfe']:.0f}", f"{means['reward_calls']:.0f}"])
    if len(ends[first]) < 2:
        return
    steered = [use for use in ends[first][0] if use.startswith(STEERED)]
    for arm in others:
        free = [use for use, scores in ends[arm][0].items() if not scores["reward_calls"]]
        for ours, theirs in product(steered, free):
            leads = [
                paired(
                    [sampled[ours][metric] for sampled in ends[first]],
                    [sampled[theirs][metric] for sampled in ends[arm]],
                ).text()
                for metric in metrics
            ]
            yield _row(f"{first} minus {arm}", [f"{ours} minus {theirs}", *leads, "", ""])


def speed(curves: Curves, metric: str) -> Iterator[str]:
    """Lines that say after how many images the first arm has what each other one ends with, if it has."""
    first, *others = curves
    budget = min(_budgets(curves, images))
    yield _row("arm", ["ends with", f"{first} has it after", "times fewer images"])
    yield "|" + "---|" * 4
    for arm in others:
        level = mean(_scores(curves, arm, (final, metric), images))
        needed = reached(curves[first], images, metric, level, budget)
        when = f"{needed:,.0f} images" if needed < math.inf else "never"
        times = f"{budget / needed:.1f}" if 0 < needed < math.inf else ""
        yield _row(arm, [f"{level:.3f}", when, times])


def _row(head: str, cells: Iterable[str]) -> str:
    return "| " + " | ".join([head, *cells]) + " |"


def leads(curves: Curves, claim: Claim) -> Iterator[list[str]]:
    """Cells of every other arm: metric, lead, at the end and area at equal images, area at equal time.

    A pair whose runs are both another claim's is compared there.
    """
    first, *others = curves
    others = [arm for arm in others if not {first, arm} <= claim.runs_of.keys()]
    metric = claim.metrics[0]
    compared: list[tuple[Measure, Cost]] = [((final, metric), images), ((area, metric), images)]
    if 0.0 in claim.reward_costs:
        compared.append(((area, metric), seconds(0.0)))
    for arm in others:
        leads = [_lead(curves, first, arm, measure, cost) for measure, cost in compared]
        yield [metric, f"{first} minus {arm}", *leads, *[""] * (3 - len(leads))]


def _lead(curves: Curves, first: str, other: str, measure: Measure, cost: Cost) -> str:
    return paired(*(_scores(curves, arm, measure, cost) for arm in (first, other))).text()


def _scores(curves: Curves, arm: str, measure: Measure, cost: Cost) -> list[float]:
    """Score of every seed at the largest cost that all arms reach with it."""
    function, metric = measure
    budgets = _budgets(curves, cost)
    return [
        function(points, cost, metric, budget) for points, budget in zip(curves[arm], budgets, strict=True)
    ]


def _budgets(curves: Curves, cost: Cost) -> list[float]:
    """Seed by seed, since a machine may have run one seed's arms and a slower one another's."""
    return [common_budget(of_seed, cost) for of_seed in zip(*curves.values(), strict=True)]
