"""What is claimed of the kernels on a CPU: each op's least speed-up, one thread, at the claim's sizes.

A claim holds in float32 and in bfloat16 and in every recorded table, of whichever processor and
instruction set, so each floor lies below the lowest ratio there.
"""

from __future__ import annotations

from typing import Any

from bench.shapes import CASES
from bench.workloads.workload import OURS, OURS_DRAWN

CLAIMS = {
    ("gaussian_step", OURS): 1.5,
    ("gaussian_step", OURS_DRAWN): 3.75,
    ("step_log_prob", OURS): 1.25,
    ("ppo_loss", OURS): 1.7,
    ("ppo_loss", OURS_DRAWN): 1.6,
    ("value_pool", OURS): 3.75,
    ("gae", OURS): 18.0,
    ("normalized_advantages", OURS): 3.25,
}
"""(op, provider) -> at least so many times as fast."""


def broken(result: dict[str, Any]) -> list[str]:
    """Every claim that a recorded table does not bear out: too slow in a dtype, or not in the table."""
    sizes = {str(cases[1]) for cases in CASES.values()}
    measured: dict[tuple[str, str], dict[str, float]] = {}
    for row in result["rows"]:
        if row["case"] in sizes and "speed_up" in row:
            measured.setdefault((row["op"], row["provider"]), {})[row["dtype"]] = row["speed_up"]
    lines = []
    for claim, floor in CLAIMS.items():
        ratios = measured.get(claim, {})
        lines += [
            f"{claim[0]}, {claim[1]}, {dtype}: {ratio:.2f}x, claimed {floor:g}x"
            for dtype, ratio in ratios.items()
            if ratio < floor
        ]
        if not ratios:
            lines.append(f"{claim[0]}, {claim[1]} is not in the table")
    return lines
