"""docs/results.md from what has been run: wins and losses alike, and what is still missing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import mean

from bench.learning import critics_section, figures, runs, steering_section, units
from bench.learning.analysis import Cost, area, common_budget, final, images, paired, seconds
from bench.learning.claims import CLAIMS, Claim
from bench.learning.figures import Curves
from bench.learning.runs import Budget, Point
from bench.learning.scales import SCALES, Scale
from lacfast.tasks.models import BackboneName

Measure = tuple[Callable[[Sequence[Point], Cost, str, float], float], str]
"""What is compared: a function of a curve, and the metric that it reads."""
DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGE = DOCS / "results.md"
HEAD = """# What learning shows

Written by `python -m bench.learning`, `bench.steering` and `bench.critic_trunks`; every run is a file.
Pictures have {size}x{size} pixels. All arms run in the same trainer and start from the same base model. Where
a section says that the learning rate was tuned, every arm had the same grid and number of tuning runs, on
prompts that are neither trained on nor reported. Arms are judged on held-out prompts, with noise that the
arms of a seed share ({samples:,} images, standard error of one judgement near {error:.3f}). Intervals are 95
% bootstrap intervals of the mean difference of paired seeds; "ahead" and "behind" mean that they exclude 0,
which with three seeds says little more than that all three differences have one sign. Images count those of
value pretraining. Seconds are without judging, CPU seconds of one thread where no GPU worked; a reward's cost
is added per image.
"""


def write(results: Path, page: Path = PAGE, scale: Scale = SCALES["cpu"]) -> None:
    """Write the page, and its figures in a folder of its name, from the folder of runs."""
    pictures, claims = page.with_suffix(""), {name: scale.claim(claim) for name, claim in CLAIMS.items()}
    sections = [
        section
        for name, claim in claims.items()
        for backbone in claim.budgets
        if (section := _section(results, name, claim, backbone, pictures))
    ]
    sections += steering_section.sections(results, pictures)
    sections += critics_section.sections(results, pictures)
    summary = list(_summary(results, claims))
    missing = list(_missing(results, claims))
    rest = ["## Not run to the end\n\n" + "\n".join(missing)] if missing else []
    samples = round(scale.samples * Budget.samples)
    head = HEAD.format(samples=samples, error=0.5 / samples**0.5, size=scale.model.image_size)
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text("\n\n".join([head.strip(), *summary, *sections, *rest]) + "\n", encoding="utf-8")


def _summary(results: Path, claims: Mapping[str, Claim]) -> Iterator[str]:
    """Of all claims: leads of the first arm in the headline's metric."""
    rows = []
    for name, claim in claims.items():
        for backbone in claim.budgets:
            curves = _paired_curves(results / name / backbone, claim, backbone)
            if curves and len(next(iter(curves.values()))) > 1:
                rows += [[f"{name}, {backbone}", *row] for row in _leads(curves, claim)]
    if rows:
        columns = ["claim", "metric", "lead", "at the end, equal images", "area, equal images"]
        columns += ["area, equal time, free reward"]
        table = [*_row(columns[0], columns[1:]), "|" + "---|" * len(columns)]
        for first, *cells in rows:
            table += _row(first, cells)
        yield "## In short\n\n" + "\n".join(table)


def _leads(curves: Curves, claim: Claim) -> Iterator[list[str]]:
    """Cells of every other arm."""
    first, *others = curves
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
    """Of every seed, at the largest cost that all curves reach."""
    budget = _common(curves, cost)
    function, metric = measure
    return [function(points, cost, metric, budget) for points in curves[arm]]


def _common(curves: Curves, cost: Cost) -> float:
    return common_budget([points for runs in curves.values() for points in runs], cost)


def _missing(results: Path, claims: Mapping[str, Claim]) -> Iterator[str]:
    for name, claim in claims.items():
        for backbone in claim.budgets:
            wanted = claim.seeds * len(claim.arms(backbone))
            found = _count(results / name / backbone)
            if found < wanted:
                yield f"- {name}, {backbone}: {found} of {wanted} runs"
    for study in ("steering", "critics"):
        if not any((results / study).rglob("*-seed*.json")):
            yield f"- {study}: nothing"


def _count(directory: Path) -> int:
    return len(list(directory.glob("*-seed*.json")))


def load(directory: Path, arms: Sequence[str]) -> dict[str, dict[int, list[Point]]]:
    """Arm -> seed -> curve, of the arms that have one."""
    curves: dict[str, dict[int, list[Point]]] = {}
    for name in arms:
        for path in _paths(directory, name):
            curves.setdefault(name, {})[units.read(path)["seed"]] = runs.read(path)
    return curves


def _paths(directory: Path, arm: str) -> list[Path]:
    return sorted(directory.glob(f"{arm.lower().replace(' ', '-')}-seed*.json"))


def _paired_curves(directory: Path, claim: Claim, backbone: BackboneName) -> Curves:
    """Arm -> curves of the seeds that every arm has, which alone can be compared; empty without one."""
    arms = list(claim.arms(backbone))
    by_seed = load(directory, arms)
    if len(by_seed) < len(arms):
        return {}
    seeds = sorted(set.intersection(*(set(curves) for curves in by_seed.values())))
    return {arm: [by_seed[arm][seed] for seed in seeds] for arm in arms} if seeds else {}


def _section(results: Path, name: str, claim: Claim, backbone: BackboneName, pictures: Path) -> str:
    curves = _paired_curves(results / name / backbone, claim, backbone)
    if not curves:
        return ""
    seeds = len(next(iter(curves.values())))
    picture = pictures / f"{name}-{backbone}.png"
    figures.draw(curves, claim.metrics, picture)
    lines = [
        f"## {name}, {backbone}",
        "",
        f"{claim.question} Problem `{claim.problem}`, paired seeds: {seeds}. "
        + _tuning(results / name / backbone, claim, backbone),
        *(["", claim.note] if claim.note else []),
        "",
        f"![curves]({pictures.name}/{picture.name})",
        "",
        *_axis_table("equal images", images, curves, claim.metrics),
    ]
    for cost in claim.reward_costs:
        title = f"equal time, reward of {1000 * cost:.0f} ms per image"
        lines += ["", *_axis_table(title, seconds(cost), curves, claim.metrics[:2])]
    return "\n".join(lines)


def _tuning(directory: Path, claim: Claim, backbone: BackboneName) -> str:
    arms = claim.arms(backbone)
    grids = {claim.rates(arm) for arm in arms.values()}
    rates = " or ".join(", ".join(f"{rate:g}" for rate in grid) for grid in sorted(grids))
    if len(claim.grid) == 1:
        return f"Policy learning rate fixed at {rates}."
    chosen = {arm: units.read(_paths(directory, arm)[0])["policy_learning_rate"] for arm in arms}
    found = ", ".join(f"{rate:g} ({arm})" for arm, rate in chosen.items())
    return f"Policy learning rate tuned over {rates}; chosen: {found}."


def _axis_table(title: str, cost: Cost, curves: Curves, metrics: Sequence[str]) -> Iterator[str]:
    """Scores at the end and over the budget, and the first arm's leads over each other one."""
    first, *others = curves
    measures: dict[str, Measure] = {metric: (final, metric) for metric in metrics}
    measures[f"area, {metrics[0]}"] = (area, metrics[0])
    yield f"At {title} ({_common(curves, cost):,.0f}):"
    yield ""
    yield from _row("arm", measures)
    yield "|" + "---|" * (len(measures) + 1)
    start = [mean(points[0].scores[metric] for points in curves[first]) for metric in metrics]
    yield from _row("base model", [*(f"{score:.3f}" for score in start), ""])
    for arm in curves:
        means = [mean(_scores(curves, arm, measure, cost)) for measure in measures.values()]
        yield from _row(arm, [f"{score:.3f}" for score in means])
    if len(curves[first]) < 2:
        return
    for arm in others:
        leads = [_lead(curves, first, arm, measure, cost) for measure in measures.values()]
        yield from _row(f"{first} minus {arm}", leads)


def _row(head: str, cells: Iterable[str]) -> Iterator[str]:
    yield "| " + " | ".join([head, *cells]) + " |"
