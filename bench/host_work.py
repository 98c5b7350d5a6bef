"""Host work of an update on graphs besides its replays, timed on a CPU: what is left where launches bind.

python -m bench.host_work      times it and writes bench/results/host-work.json, which `bench.report` shows

A microbatch is the tiny transformer's, whose replay does nothing here: gathering and copying a single pair
remain, at what they cost the host. The rest walks over the modules of a full-size model on the meta device.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from bench import machine
from bench.equal_results import scored_rollout
from bench.interleaved import race
from bench.matched_loops import engine, tiny_match
from bench.published import PUBLISHED, trained_backbone
from lacfast.backbone import build_critic
from lacfast.backbones import lora as adapters
from lacfast.backbones.latent import LatentBackbone
from lacfast.config import CriticConfig, GraphConfig
from lacfast.learning.batches import PolicySource
from lacfast.runtime.fake_graph import FakeGraph
from lacfast.runtime.graph import weights_of

RESULT = Path(__file__).parent / "results" / "host-work.json"
FULL_SIZE = "sd35_medium"
GRAPH = GraphConfig(mode="fake", strict=True, warmup_steps=1)
WALKS = (
    "what a forward depends on, once per optimizer step",
    "where weights are, once per iteration",
    "the adapter off and on, eager forward of the anchor",
    "the critic's taps, eager forward of the policy",
)
FEW, MANY = 4, 32
"""Microbatches of two optimizer steps; what a step costs once falls out of their difference."""


def microbatch_seconds(*, rounds: int, clock: Callable[[], float] = time.thread_time) -> float:
    """Median host seconds of one more microbatch of the tiny transformer, without its replay."""
    match = tiny_match("dit", batches=1, num_steps=6)
    trainer = engine(match, microbatch_size=1, graph=GRAPH)
    rollout = scored_rollout(trainer, match)
    advantages = trainer.advantages(rollout)
    for iteration in range(2):
        trainer.learner.learn(rollout, advantages, iteration)
    update = trainer.learner.policy_update
    source = PolicySource(rollout, advantages, update.tables.timesteps)
    captures = trainer.learner._graphs.statistics.captures
    steps = {
        str(count): partial(update.step, source, source.pairs.select(slice(count))) for count in (FEW, MANY)
    }
    with patch.object(FakeGraph, "replay", lambda self: None):
        seconds = race(steps, rounds=rounds, clock=clock)
    assert trainer.learner._graphs.statistics.captures == captures
    differences = (many - few for few, many in zip(seconds[str(FEW)], seconds[str(MANY)], strict=True))
    return statistics.median(differences) / (MANY - FEW)


def walks(backbone: LatentBackbone) -> dict[str, Callable[[], object]]:
    """What walks over the modules of a model with a LoRA, or did."""
    model = backbone.model
    # A weight that is copied to the meta device would be made first.
    with backbone.device:
        critic = build_critic(backbone, 1, CriticConfig(trunk="branch"))
    assert critic is not None

    def switch() -> None:
        with adapters.activated(model, None):
            """The anchor's forward would run."""

    def record() -> None:
        with critic.record(model):
            """The policy's forward would run."""

    works = (backbone.forward_signature, lambda: weights_of({"model": model}), switch, record)
    return dict(zip(WALKS, works, strict=True))


def measure(*, rounds: int) -> dict[str, Any]:
    """Milliseconds by what is done."""
    found = {"a captured microbatch, tiny transformer": microbatch_seconds(rounds=rounds)}
    seconds = race(walks(trained_backbone(PUBLISHED[FULL_SIZE])), rounds=rounds)
    found |= {name: statistics.median(times) for name, times in seconds.items()}
    return {
        "milliseconds": {name: round(1e3 * value, 4) for name, value in found.items()},
        "model": PUBLISHED[FULL_SIZE].title,
        "label": machine.label(torch.device("cpu")),
        "torch": torch.__version__,
        "date": machine.today(),
    }


def table(result: dict[str, Any]) -> str:
    """The times, as Markdown."""
    lines = ["| host work besides replays | ms |", "|---|---|"]
    lines += [f"| {name} | {value:.3f} |" for name, value in result["milliseconds"].items()]
    note = (
        f"One thread of {result['label']}, torch {result['torch']}, {result['date']}: medians of CPU time. A "
        f"microbatch is timed by its difference to a step with fewer of them; the other rows are of "
        f"{result['model']} with a LoRA of rank 32. `python -m bench.host_work` measures it."
    )
    return "\n".join([*lines, "", note])


def main() -> None:
    torch.set_num_threads(1)
    result = measure(rounds=20)
    RESULT.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(table(result))


if __name__ == "__main__":
    main()
