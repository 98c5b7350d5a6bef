"""The methods that compete at one budget, and the settings that each may choose from on tuning prompts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from lacfast.config import SamplerConfig, SteeringConfig
from lacfast.records import TransitionTable
from lacfast.steering import planned_evaluations
from lacfast.steering.guidance import guided_steps

UNSTEERED = "one image"
BASELINE = "best of n"
LEAST_SHARE = 0.75
"""Share of the budget that a candidate must use, where one can: a cheap one would not be at equal NFE."""
TEMPERATURES = (0.1, 0.3, 1.0)
PRUNINGS = ((0.5,), (0.5, 0.75), (0.375, 0.625), (0.25, 0.5), (0.25, 0.5, 0.75), (0.25, 0.375, 0.5))
GUIDANCES = (
    {"guidance_form": "relative", "guidance_weight": 0.05},
    {"guidance_form": "relative", "guidance_weight": 0.1},
    {"guidance_form": "relative", "guidance_weight": 0.2},
    {"guidance_form": "score", "guidance_weight": 1.0},
    {"guidance_form": "score", "guidance_weight": 4.0},
    {"guidance_form": "mean_shift", "guidance_weight": 4.0},
)
WINDOWS = ((0.3, 0.8), (0.45, 0.7))
"""Gradients are dear; the second takes two or three of the middle steps."""


def arms(
    table: TransitionTable, sampler: SamplerConfig, budget: float, chooser: str
) -> dict[str, list[SteeringConfig]]:
    """Method -> candidates that fit into `budget` NFE per image.

    Args:
        table: the sampler's.
        sampler: for its guidance scale.
        budget: most NFE per image; candidates use at least LEAST_SHARE of it where one can.
        chooser: "value" or "reward", what picks among the trajectories that reach the end.

    Raises:
        ValueError: for a budget that does not hold one image.
    """

    def cost(config: SteeringConfig) -> float:
        return planned_evaluations(config, table, guidance_scale=sampler.guidance_scale)

    single = SteeringConfig(method="best_of_n", particles=1)
    if cost(single) > budget:
        raise ValueError(f"budget={budget} holds no image of {cost(single)} forwards")

    def filled(config: SteeringConfig) -> Iterator[SteeringConfig]:
        """The candidate with as many particles as fit, if any do."""
        sizes = range(1, int(budget) + 1)
        if config.method == "pruning":
            halvings = len(config.prune_fractions)
            sizes = [1 << power for power in range(halvings, 8)]  # type: ignore[assignment]
        sized = [replace(config, particles=size) for size in sizes]
        fitting = [candidate for candidate in sized if _valid(candidate, table) and cost(candidate) <= budget]
        yield from fitting[-1:]

    groups: dict[str, list[SteeringConfig]] = {
        BASELINE: [SteeringConfig(method="best_of_n")],
        "pruning": [SteeringConfig(method="pruning", prune_fractions=steps) for steps in PRUNINGS],
        "guidance": [SteeringConfig(method="best_of_n", **guidance) for guidance in _guidances()],
        "guidance, pruning": [
            SteeringConfig(method="pruning", prune_fractions=steps, **guidance)
            for steps in PRUNINGS[:3]
            for guidance in _guidances()
        ],
        "smc": [
            SteeringConfig(method="smc", temperature=tau, annealing=power, final_choice="best")
            for tau in TEMPERATURES
            for power in (0.0, 1.0)
        ],
        "guidance, smc": [
            SteeringConfig(method="smc", temperature=tau, final_choice="best", **guidance)
            for tau in TEMPERATURES[1:]
            for guidance in _guidances()
        ],
        "beam": [
            SteeringConfig(method="beam", candidates=children, temperature=tau)
            for children in (2, 3, 4, 5, 6, 8)
            for tau in (0.0, *TEMPERATURES[:2])
        ],
    }
    found = {UNSTEERED: [replace(single, selection=chooser)]}
    for name, candidates in groups.items():
        fitting = [fit for candidate in candidates for fit in filled(replace(candidate, selection=chooser))]
        spent = [fit for fit in fitting if cost(fit) >= LEAST_SHARE * budget]
        if fitting:
            found[name] = list(dict.fromkeys(spent or fitting))
    return found


def _guidances() -> Iterator[dict[str, object]]:
    for guidance in GUIDANCES:
        for window in WINDOWS:
            yield guidance | {"guidance_window": window}


def _valid(config: SteeringConfig, table: TransitionTable) -> bool:
    """Whether steer would take it with this sampler."""
    if config.method == "pruning":
        steps = [round(fraction * table.num_steps) for fraction in config.prune_fractions]
        if len(set(steps)) < len(steps) or not all(0 < step < table.num_steps for step in steps):
            return False
    return not config.guided or any(guided_steps(config, table))
