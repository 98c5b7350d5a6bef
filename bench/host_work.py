"""Host work of an update on graphs besides its replays, and of eager ops, timed on a CPU: what is left where
launches bind.

python -m bench.host_work   times it and writes bench/results/host-work-MAKER.json, which `bench.report` shows

A microbatch is the tiny transformer's, whose replay does nothing here: gathering and copying a single pair
remain, at what they cost the host. Walks are over the modules of a full-size model on the meta device. Eager
ops have so small inputs that their own time is the host's.
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
from bench.shapes import CASES, CLAIM_LATENT, LatentCase
from bench.workloads import WORKLOADS
from bench.workloads.workload import OURS
from lacfast import ops
from lacfast.backbone import build_critic
from lacfast.backbones import lora as adapters
from lacfast.backbones.latent import LatentBackbone
from lacfast.config import CriticConfig, GraphConfig
from lacfast.learning.batches import PolicySource
from lacfast.runtime.fake_graph import FakeGraph
from lacfast.runtime.graph import weights_of

RESULTS = Path(__file__).parent / "results"
FULL_SIZE = "sd35_medium"
GRAPH = GraphConfig(mode="fake", strict=True, warmup_steps=1)
WALKS = (
    "what a forward depends on, once per optimizer step",
    "where weights are, once per iteration",
    "the adapter off and on, eager forward of the anchor",
    "the critic's taps, eager forward of the policy",
)
SMALL_LATENT = LatentCase("small", 2, (4, 4, 4))
LATENTS_MIB = 4 * CLAIM_LATENT.elements * torch.float32.itemsize >> 20
CALLS = 200
"""Of an eager op, timed together."""
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


class _Nothing(torch.autograd.Function):
    """What autograd and Python take by themselves."""

    @staticmethod
    def forward(ctx: Any, sample: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(sample)
        return sample.new_empty(())

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        (sample,) = ctx.saved_tensors
        return torch.empty_like(sample)


def eager_calls() -> dict[str, Callable[[], object]]:
    """Ops on inputs so small that the host is what they take, and a gradient of nothing."""

    def inputs_and_call(op: str) -> tuple[dict[str, torch.Tensor], Callable[[], object]]:
        entry = WORKLOADS[op]
        case = SMALL_LATENT if entry.kind is LatentCase else CASES[entry.kind][0]
        workload = entry.build(case, torch.float32, torch.device("cpu"), compiled=False)
        return workload.inputs, partial(workload.providers[OURS], workload.inputs)

    calls = {f"`{op}`": inputs_and_call(op)[1] for op in ("gae", "value_pool", "gaussian_step")}
    calls["`normalized_advantages`"] = inputs_and_call("normalized_advantages")[1]
    inputs, with_gradient = inputs_and_call("step_log_prob")
    names = ("sample", "model_output", "prev_sample", "coefficients", "steps")
    calls["`step_log_prob`"] = partial(ops.step_log_prob, *(inputs[name].detach() for name in names))
    output = inputs["model_output"]
    calls["`step_log_prob`, its sum and the gradient of that"] = with_gradient
    calls["`ppo_loss` and its gradient"] = inputs_and_call("ppo_loss")[1]
    calls["a torch.autograd.Function of nothing and its gradient"] = lambda: torch.autograd.grad(
        _Nothing.apply(output), output
    )
    return calls


def eager_microseconds(*, rounds: int) -> dict[str, float]:
    """Median host time of a call."""

    def repeated(call: Callable[[], object]) -> None:
        for _ in range(CALLS):
            call()

    seconds = race({name: partial(repeated, call) for name, call in eager_calls().items()}, rounds=rounds)
    return {name: round(1e6 * statistics.median(times) / CALLS, 2) for name, times in seconds.items()}


def eager_microseconds_after_other_work(*, rounds: int) -> dict[str, float]:
    """Median host time of a call whose code has left the nearer caches for other data, as an op's own."""
    latents = [torch.ones(CLAIM_LATENT.elements) for _ in range(4)]

    def other_work() -> None:
        torch.addcmul(*latents[:3], out=latents[3])

    calls = eager_calls()
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            call()
            other_work()
            start = time.thread_time()
            call()
            seconds[name].append(time.thread_time() - start)
    return {name: round(1e6 * statistics.median(times), 2) for name, times in seconds.items()}


def measure(*, rounds: int) -> dict[str, Any]:
    """Milliseconds by what is done, and microseconds of eager ops."""
    # First, while the process is small: a collection of garbage walks over all that lives.
    eager = eager_microseconds(rounds=rounds)
    after_other_work = eager_microseconds_after_other_work(rounds=4 * rounds)
    found = {"a captured microbatch, tiny transformer": microbatch_seconds(rounds=rounds)}
    seconds = race(walks(trained_backbone(PUBLISHED[FULL_SIZE])), rounds=rounds)
    found |= {name: statistics.median(times) for name, times in seconds.items()}
    return {
        "milliseconds": {name: round(1e3 * value, 4) for name, value in found.items()},
        "eager_microseconds": eager,
        "eager_microseconds_after_other_work": after_other_work,
        "model": PUBLISHED[FULL_SIZE].title,
        "label": machine.label(torch.device("cpu")),
        "torch": torch.__version__,
        "date": machine.today(),
    }


def table(result: dict[str, Any]) -> str:
    """The times, as Markdown."""
    lines = ["| host work besides replays | ms |", "|---|---|"]
    lines += [f"| {name} | {value:.3f} |" for name, value in result["milliseconds"].items()]
    lines += ["", "| host work of an eager op | us | after other work |", "|---|---|---|"]
    cold = result.get("eager_microseconds_after_other_work", {})
    lines += [
        f"| {name} | {value:.1f} | {f'{cold[name]:.0f}' if name in cold else ''} |"
        for name, value in result["eager_microseconds"].items()
    ]
    note = (
        f"One thread of {result['label']}, torch {result['torch']}, {result['date']}: medians of CPU time, "
        f"of calls that follow one another and of one that follows a pass over {LATENTS_MIB} MiB, where "
        f"that was measured. A "
        f"microbatch is timed by its difference to a step with fewer of them; the other rows of the first "
        f"table are of {result['model']} with a LoRA of rank 32. `python -m bench.host_work` measures it."
    )
    return "\n".join([*lines, "", note])


def main() -> None:
    torch.set_num_threads(1)
    result = measure(rounds=20)
    path = RESULTS / f"host-work-{machine.maker()}.json"
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(table(result))


if __name__ == "__main__":
    main()
