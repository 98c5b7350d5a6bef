"""What the recipes hold in memory at their peak, phase by phase, counted in full size on the meta device.

python -m bench.memory      counts and writes bench/results/memory.json, which `bench.report` shows
"""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from lacfast.runs.capacity import MemoryPlan
from lacfast.runs.config import RunConfig
from lacfast.runs.embedded import TINY_MODELS
from lacfast.runs.plan import plan
from lacfast.runs.recipes import recipes

RESULT = Path(__file__).parent / "results" / "memory.json"


def configurations() -> dict[str, RunConfig]:
    """Every recipe of a published model, on one GPU."""
    found = {name: recipe.settings for name, recipe in recipes().items()}
    return {
        name: replace(config, train=replace(config.train, shard=1, shard_gradients=False))
        for name, config in found.items()
        if config.model not in TINY_MODELS
    }


def measure(config: RunConfig) -> dict[str, Any]:
    """Bytes of trajectories and phases, and of the layout before rollouts lay on the host."""
    memory = plan(config).memory
    return {
        "trajectory": memory.rollout_bytes // config.train.batch_size,
        "kept": memory.kept_bytes,
        "phases": [asdict(phase) | {"device": phase.device} for phase in memory.phases],
        "before": before(memory, config),
    }


def before(memory: MemoryPlan, config: RunConfig) -> dict[str, int]:
    """Bytes on the device where all was kept there, and a rollout's parts beside it and the last one.

    The last rollout lived while the next was sampled, and the parts while they were joined. Of value
    pretraining the held-out rollout and the kept ones were there, whole.
    """
    train, phases = config.train, {phase.name: phase for phase in memory.phases}
    rollout, sampled = memory.rollout_bytes, phases["rollout"]
    size = min(train.rollout_batch_size or train.batch_size, train.batch_size)
    # Once more while it is joined, or all but the part that is sampled beside that.
    joined = max(2 * rollout, rollout - rollout * size // train.batch_size + sampled.batch)
    own = joined if size < train.batch_size else sampled.batch
    found = {"rollout": memory.weight_bytes + memory.training_bytes + rollout + own}
    if made := phases.get("value pretraining, rollout"):
        settings = train.pretrain
        kept = min(settings.kept_rollouts, settings.iterations - 1) * train.batch_size
        kept += settings.held_out_samples
        found["value pretraining"] = made.fixed + kept * rollout // train.batch_size + own
    return found


def table(result: dict[str, Any]) -> str:
    """Bytes per trajectory and the peak of every phase, before and after, as Markdown."""
    head = "trajectory | before: value pretraining | rollout | after: value pretraining | rollout | update"
    lines = [f"| | {head} | evaluation | prompts | host |", "|---|---|---|---|---|---|---|---|---|---|"]
    for name, row in result.items():
        peaks: dict[str, int] = {}
        for phase in row["phases"]:
            kind = phase["name"].partition(",")[0].removeprefix("policy ").removeprefix("critic ")
            peaks[kind] = max(peaks.get(kind, 0), phase["device"])
        host = max(phase["host"] for phase in row["phases"])
        cells = [
            f"{row['trajectory'] / 2**20:.1f} MiB",
            *(_gigabytes(row["before"].get(kind)) for kind in ("value pretraining", "rollout")),
            *(
                _gigabytes(peaks.get(kind))
                for kind in ("value pretraining", "rollout", "update", "evaluation", "encoding prompts")
            ),
            _gigabytes(host),
        ]
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    note = (
        "GB at the peak, weights and decoder included, and under `prompts` the text encoders while they "
        "encode a block of them, where a recipe keeps them off the device. A lower bound: reward "
        "models, captured graphs, the context of CUDA and fragments come on top. `before` is the same "
        "count for the layout in which rollouts of value pretraining lay on the device and a rollout was "
        "joined from its parts. Where the size of a microbatch is found from the free memory, the update "
        "is that of one pair. Twelve billion weights with gradients and moments in float32 fit no GPU of "
        "80 GB: DanceGRPO's script shards them over 16. A test follows every allocation of a whole run of "
        "a small model and finds the peaks that were planned. `python -m bench.memory` counts it."
    )
    return "\n".join([*lines, "", note])


def _gigabytes(count: int | None) -> str:
    return "" if count is None else f"{count / 1e9:.1f}"


def main() -> None:
    result = {name: measure(config) for name, config in configurations().items()}
    RESULT.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
