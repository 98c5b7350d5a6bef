"""The README's table of what training the published models costs, from bench/results/costs.json."""

from __future__ import annotations

from typing import Any


def table(result: dict[str, Any]) -> str:
    """Kernels of a step and FLOPs of an image, model by model, as Markdown."""
    kernels = "model's kernels | added: step | heads | branch | values: heads | branch"
    lines = [
        f"| | {kernels} | TFLOP: sampling | heads | branch | update |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in result.values():
        counts, flops = row["kernels"], row["flops_per_image"]
        own = counts["model"]
        added = " | ".join(f"{counts['step'][trunk] - own:,}" for trunk in ("none", "shared", "branch"))
        valued = " | ".join(f"{counts['values'][trunk]:,}" for trunk in ("shared", "branch"))
        shares = " | ".join(
            f"+{100 * flops['values'][trunk] / flops['sampling']:.2g} %" for trunk in ("shared", "branch")
        )
        lines.append(
            f"| {row['title']} | {own:,} | {added} | {valued} | {flops['sampling'] / 1e12:,.0f} | {shares} "
            f"| {policy_update(flops) / 1e12:,.0f} |"
        )
    row = result["sd35_medium"]
    ratio = same_maths(row["flops_per_image"]) / same_maths(row["flow_grpo_flops_per_image"])
    guided = ", ".join(row["title"].split(",")[0] for row in result.values() if row["is_guided"])
    note = (
        f"A LoRA of rank 32; {guided} with classifier-free guidance. Kernels of a denoising step are what "
        "torch dispatches but views and allocations; they are no time. With a critic the step only stores "
        "what the critic reads, one kernel per tensor; its values come after the last step, those of several "
        "steps together. The host waits in no step and in no microbatch. An image of SD3.5-M's iteration "
        f"takes {100 * (1 - ratio):.0f} % fewer FLOPs than in "
        "flow_grpo's loop of the same maths, the critic aside: 24 images per prompt, two optimizer steps per "
        "rollout. `python -m bench.costs` counts it."
    )
    return "\n".join([*lines, "", note])


def policy_update(flops: dict[str, Any]) -> float:
    """FLOPs of the policy's update of one image, its reference included."""
    return float(flops["reference"] + flops["update_forward"] + flops["update_backward"])


def same_maths(flops: dict[str, Any]) -> float:
    """FLOPs of an image in an iteration without a critic."""
    return policy_update(flops) + float(flops["prompt"] + flops["sampling"] + flops["decode"])
