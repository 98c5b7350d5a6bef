"""What a method costs, in closed form: forwards of an image before any work is done."""

from __future__ import annotations

from lacfast.config import SteeringConfig
from lacfast.records import TransitionTable
from lacfast.steering.guidance import guided_steps
from lacfast.steering.stats import BACKWARD_COST


def prune_steps(config: SteeringConfig, table: TransitionTable) -> list[int]:
    """Steps at whose state the worse half is dropped; none for other methods.

    Raises:
        ValueError: for a fraction of the steps that is no step.
    """
    if config.method != "pruning" or config.particles == 1:
        return []
    steps = [round(fraction * table.num_steps) for fraction in config.prune_fractions]
    if len(set(steps)) < len(steps) or not all(0 < step < table.num_steps for step in steps):
        raise ValueError(
            f"prune_fractions={config.prune_fractions} of {table.num_steps} steps are the steps {steps}; "
            f"they must differ and lie between 1 and {table.num_steps - 1}"
        )
    return steps


def children(config: SteeringConfig, table: TransitionTable, step: int) -> int:
    """Candidates that a trajectory tries at a step. Where it draws no noise they would all be the same."""
    is_open = config.method == "beam" and float(table.std[step]) > 0 and step + 1 < table.num_steps
    return config.candidates if is_open else 1


def trajectories_per_step(config: SteeringConfig, table: TransitionTable) -> list[int]:
    """States of one image that the model sees at each of T steps."""
    halvings = prune_steps(config, table)
    counts = []
    for step in range(table.num_steps):
        pruned = config.particles >> sum(earlier < step for earlier in halvings)
        counts.append(max(pruned, 1) * (children(config, table, step - 1) if step else 1))
    return counts


def planned_evaluations(
    config: SteeringConfig, table: TransitionTable, *, guidance_scale: float = 1.0, critic_forwards: int = 0
) -> float:
    """NFE of an image but for the sign test: forwards, and backwards counted as two forwards.

        sum_k N_k (1 + [guidance_scale > 1] + critic_forwards + 2 [step k is guided])

    N_k of T steps: N (best_of_n, smc); N halved after every prune step (pruning); N M behind a step that
    draws noise, else N (beam).

    Args:
        config: method and guidance.
        table: the sampler.
        guidance_scale: above 1 the unconditional half runs too.
        critic_forwards: of the whole model that the critics make for a value: 1 for trunk "copy" or "lora",
            else 0.
    """
    forwards = 1 + (guidance_scale > 1) + critic_forwards
    guided = guided_steps(config, table)
    counts = trajectories_per_step(config, table)
    return float(
        sum(
            count * (forwards + BACKWARD_COST * is_guided)
            for count, is_guided in zip(counts, guided, strict=True)
        )
    )
