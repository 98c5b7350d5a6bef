"""lacfast's iteration beside the peers' loops: same model, noise-matched results, phase by phase.

    OMP_NUM_THREADS=1 python -m bench.iteration           writes bench/results/iteration-cpu-DATE.json
    python -m bench.iteration --models dit --rounds 3     some of it, to the screen only

Every peer's loop runs twice: at its published batch, and at the batch at which the same loop is fastest here.
The second comparison is the honest one: it leaves nothing to gain by merely setting a number. Contenders take
turns; a speed-up is the median over the rounds of the ratio within a round, in CPU time of the process.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench import machine
from bench.arms import ARMS, EAGER, PREPARE_SECONDS, arm_changes, time_limit
from bench.equal_results import both_gradients, both_trajectories, relative, scored_rollout
from bench.interleaved import Provider, race, speed_ups
from bench.matched_loops import PEER_BATCH, Match, PeerLoop, engine, peer_loop, plain_score, tiny_match
from bench.peer_loops import FlowGRPOLoop, Samples, samples_of
from bench.peer_loops.samples import doubled, embeddings_of
from bench.random_models import Subject, match_of, subjects, tiny_subjects
from lacfast.prompts import PromptSet
from lacfast.records import Rollout
from lacfast.trainer import LatentActorCriticTrainer

FAMILIES = ("dit", "unet")
RESULTS = Path(__file__).parent / "results"
PHASES = ("sampling", "reference", "update", "iteration")
"""The update contains the reference; the iteration contains all, decoding and advantages too."""
PUBLISHED, TUNED = "peer, published batch", "peer, tuned batch"
OURS = "lacfast"
ROUNDS = 5
Phases = dict[str, Provider]


def peer_phases(match: Match, loop: PeerLoop, samples: Samples) -> Phases:
    """The phases of a peer's loop; training is on given trajectories."""
    prompts = list(match.prompts)
    phases: Phases = {
        "sampling": lambda: loop.sample(prompts),
        "update": lambda: loop.train([samples]),
        "iteration": lambda: loop.iteration(prompts, plain_score),
    }
    if isinstance(loop, FlowGRPOLoop) and match.kl_weight > 0:
        phases["reference"] = lambda: _peer_reference(loop, samples)
    return phases


def _peer_reference(loop: FlowGRPOLoop, samples: Samples) -> None:
    """All the reference forwards of a pass, as the loop's training makes them."""
    size = loop.settings.batch_size
    for first in range(0, len(samples["timesteps"]), size):
        batch = {name: tensor[first : first + size] for name, tensor in samples.items()}
        uncond = loop.model.encode_unconditional(len(batch["timesteps"]))
        embeddings = doubled(uncond, embeddings_of(batch))
        for step in range(loop.num_trained):
            loop.reference(batch, step, embeddings)


def engine_phases(match: Match, trainer: LatentActorCriticTrainer, rollout: Rollout) -> Phases:
    """The phases of lacfast's trainer; the update is on a given rollout."""
    prompts = PromptSet.create(match.prompts)
    phases: Phases = {
        "sampling": lambda: trainer.rollout(prompts, 0),
        "update": lambda: trainer.update(rollout),
        "iteration": trainer.train_iteration,
    }
    if trainer.learner.anchor is not None:
        phases["reference"] = lambda: _engine_reference(trainer, rollout)
    return phases


def _engine_reference(trainer: LatentActorCriticTrainer, rollout: Rollout) -> None:
    anchor, device = trainer.learner.anchor, rollout.latents.device
    assert anchor is not None
    anchor.outputs(
        rollout,
        torch.tensor(rollout.table.trainable_steps, device=device),
        rollout.table.timesteps.to(device),
        batch_size=trainer.config.ppo.microbatch_size or rollout.batch_size,
    )


def on_device(provider: Provider, device: torch.device) -> Provider:
    """A call that ends when the device has done its work."""
    if device.type != "cuda":
        return provider

    def call() -> None:
        provider()
        torch.cuda.synchronize(device)

    return call


def fastest(candidates: Sequence[int], build: Callable[[int], Provider], clock: Callable[[], float]) -> int:
    """The size whose second call is the quickest."""
    if len(candidates) == 1:
        return candidates[0]
    seconds = {}
    for size in candidates:
        call = build(size)
        call()
        start = clock()
        call()
        seconds[size] = clock() - start
    return min(seconds, key=lambda size: seconds[size])


def contest(
    match: Match,
    *,
    arms: dict[str, dict[str, Any]],
    published_size: int,
    tuned_sizes: Sequence[int],
    microbatch_sizes: Sequence[int],
    rounds: int,
    device: torch.device,
    is_compared: bool = True,
    prepare_seconds: float = math.inf,
) -> dict[str, Any]:
    """Race all contenders through all phases.

    Args:
        match: what they do.
        arms: contender -> changes of our TrainConfig; OURS is among them.
        published_size: the peer's batch.
        tuned_sizes: batches among which the tuned loop chooses.
        microbatch_sizes: among which ours chooses.
        rounds: of every phase.
        device: where the models are.
        is_compared: whether to prove equal results too, which takes float64 models.
        prepare_seconds: limit of an arm's first iteration, which compiles; one beyond it is left out.
    """
    # One thread's CPU time is blind to the threads that score.
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    scout = engine(match, microbatch_size=microbatch_sizes[0])
    rollout = scored_rollout(scout, match)
    samples = samples_of(rollout, scout.advantages(rollout))

    def peer(size: int) -> Phases:
        return peer_phases(match, peer_loop(match, batch_size=size), samples)

    def ours(size: int, **changes: Any) -> Phases:
        return engine_phases(match, engine(match, microbatch_size=size, **changes), rollout)

    tuned = fastest(tuned_sizes, lambda size: on_device(peer(size)["iteration"], device), clock)
    microbatch = fastest(microbatch_sizes, lambda size: on_device(ours(size)["update"], device), clock)
    del scout
    contenders = {PUBLISHED: peer(published_size)}
    contenders[TUNED] = contenders[PUBLISHED] if tuned == published_size else peer(tuned)
    missing = {}
    for name, changes in arms.items():
        phases = ours(microbatch, **changes)
        try:
            with time_limit(prepare_seconds if changes["compile"] else math.inf):
                on_device(phases["iteration"], device)()
        except TimeoutError as error:
            missing[name] = str(error)
        else:
            contenders[name] = phases
    rows = []
    for phase in PHASES:
        calls = {
            name: on_device(phases[phase], device) for name, phases in contenders.items() if phase in phases
        }
        if calls:
            seconds = race(calls, rounds=rounds, warmup=1, clock=clock, is_primed=False)
            rows += [{"phase": phase} | row for row in _rows(seconds)]
    return {
        "model": match.name,
        "peer": match.peer,
        "trajectories": match.trajectories,
        "num_steps": match.num_steps,
        "num_updates": match.num_updates,
        "published_batch": published_size,
        "tuned_batch": tuned,
        "microbatch_size": microbatch,
        "differences": differences(match, microbatch) if is_compared else {},
        "missing": missing,
        "rows": rows,
    }


def _rows(seconds: dict[str, list[float]]) -> list[dict[str, Any]]:
    published, tuned = speed_ups(seconds, PUBLISHED), speed_ups(seconds, TUNED)
    return [
        {
            "contender": name,
            "milliseconds": 1e3 * statistics.median(times),
            "over_published": published[name],
            "over_tuned": tuned[name],
        }
        for name, times in seconds.items()
    ]


def differences(match: Match, microbatch_size: int) -> dict[str, float]:
    """What the race compares is equal: relative differences of trajectories and gradients."""
    latents, their_latents = both_trajectories(match, batch_size=PEER_BATCH[match.peer])
    own, theirs = both_gradients(
        replace(match, num_updates=1),
        batch_size=PEER_BATCH[match.peer],
        microbatch_size=microbatch_size,
        dtype=torch.float64,
    )
    return {
        "latents_float64": relative(latents, their_latents),
        "gradients_float64": relative(own, theirs),
    }


def table(result: dict[str, Any]) -> str:
    """One line per phase and contender."""
    lines = [f"{result['model']} beside {result['peer']}: {result['differences']}"]
    lines += [
        f"  {row['phase']:<11}{row['contender']:<24}{row['milliseconds']:9.0f} ms"
        f"{row['over_published']:7.2f}x published{row['over_tuned']:7.2f}x tuned"
        for row in result["rows"]
    ]
    lines += [f"  {name}: {reason}" for name, reason in result["missing"].items()]
    return "\n".join(lines)


def cpu_contest(family: Any, *, rounds: int, is_quick: bool) -> dict[str, Any]:
    """A tiny model on one CPU thread: 8 batches of the peer's size, 6 steps, two optimizer steps."""
    match = replace(tiny_match(family, batches=8, num_steps=6), num_updates=2)
    device = torch.device("cpu")
    arms = {OURS: arm_changes(ARMS[EAGER], device)}
    if is_quick:
        match = tiny_match(family, batches=1, num_steps=3)
    else:
        arms[f"{OURS}, compiled"] = arm_changes(ARMS["compile"], device)
    return contest(
        match,
        arms=arms,
        published_size=PEER_BATCH[match.peer],
        tuned_sizes=[match.trajectories // part for part in ((1,) if is_quick else (4, 2, 1))],
        microbatch_sizes=(128,) if is_quick else (64, 128, 256),
        rounds=rounds,
        device=device,
    )


def cuda_contest(subject: Subject, *, rounds: int) -> dict[str, Any]:
    """A model with random weights in bfloat16; the peer under autocast over a float32 base, as it runs.

    Of a tiny one all arms take part, and results are compared in float64.
    """
    device = torch.device("cuda")
    match = match_of(subject, torch.bfloat16)
    size = PEER_BATCH[match.peer]
    while True:
        try:
            return _cuda_contest(match, size, rounds=rounds, is_tiny=subject.is_tiny, device=device)
        except torch.OutOfMemoryError:
            if size == 1:
                raise
            # The next size that divides the trajectories; the record says which one it became.
            size = max(part for part in range(1, size) if match.trajectories % part == 0)
            torch.cuda.empty_cache()


def _cuda_contest(
    match: Match, size: int, *, rounds: int, is_tiny: bool, device: torch.device
) -> dict[str, Any]:
    return contest(
        match,
        arms={
            OURS if name == EAGER else f"{OURS}, {name}": arm_changes(arm, device)
            for name, arm in ARMS.items()
            if is_tiny or name in (EAGER, "compile+graph")
        },
        published_size=size,
        # A large model is compute-bound at the published batch, and a larger one would not fit.
        tuned_sizes=(match.trajectories,) if is_tiny else (size,),
        microbatch_sizes=(match.trajectories * 2,) if is_tiny else (size,),
        rounds=rounds,
        device=device,
        is_compared=is_tiny,
        prepare_seconds=PREPARE_SECONDS,
    )


def rounds_of(options: argparse.Namespace) -> int:
    """How often a phase is timed: once in a rehearsal, at most three times of a large model."""
    if options.quick:
        return 1
    return min(options.rounds, 3) if options.device == "cuda" else int(options.rounds)


def plans(options: argparse.Namespace) -> dict[str, Callable[[], dict[str, Any]]]:
    """Title -> a contest that has not begun."""
    rounds = rounds_of(options)
    if options.device == "cpu":
        return {
            family: partial(cpu_contest, family, rounds=rounds, is_quick=options.quick)
            for family in options.models
        }
    device = torch.device("cuda")
    if options.quick:
        tiny = tiny_subjects(device, families=options.models)
        return {subject.title: partial(cuda_contest, subject, rounds=rounds) for subject in tiny}
    return {
        subject.title: partial(cuda_contest, subject, rounds=rounds)
        for subject in subjects(device)
        if subject.peer is not None
    }


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(prog="python -m bench.iteration", description=__doc__.split("\n")[0])
    options.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    options.add_argument("--models", nargs="+", choices=FAMILIES, default=list(FAMILIES), help="tiny ones")
    options.add_argument("--rounds", type=int, default=ROUNDS, help="at most 3 of a large model")
    options.add_argument("--quick", action="store_true", help="tiny sizes, one round: a rehearsal")
    options.add_argument("--seconds", type=float, default=7200.0, help="start no contest after this")
    options.add_argument("--out", type=Path, help="JSON; by default only a full run on a CPU is kept")
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("iteration: --device cuda needs a CUDA device; --device cpu runs anywhere", file=sys.stderr)
        return 2
    if device.type == "cuda" and options.models != list(FAMILIES) and not options.quick:
        print(
            "iteration: --models names tiny models, which are not all that a GPU runs; add --quick, or leave "
            "it out",
            file=sys.stderr,
        )
        return 2
    if options.quick and options.rounds != ROUNDS:
        print(
            f"iteration: --rounds {options.rounds} with --quick, which times one; leave one of them out",
            file=sys.stderr,
        )
        return 2
    torch.set_num_threads(1)
    out = options.out
    is_full = options.models == list(FAMILIES) and options.rounds >= ROUNDS and not options.quick
    if out is None and is_full and device.type == "cpu":
        out = RESULTS / f"iteration-cpu-{machine.today()}.json"
    record: dict[str, Any] = {
        "date": machine.today(),
        "machine": machine.describe(device),
        "rounds": rounds_of(options),
        "contests": [],
        "rows": [],
        "missing": {},
    }
    start = time.monotonic()
    for title, run in plans(options).items():
        if time.monotonic() - start > options.seconds:
            record["missing"][title] = f"not started within {options.seconds:g} s"
            continue
        try:
            result = run()
        except torch.OutOfMemoryError as error:
            record["missing"][title] = str(error).splitlines()[0]
            continue
        print(table(result), flush=True)
        record["rows"] += [{"model": title} | row for row in result.pop("rows")]
        record["contests"].append(result)
        if out is not None:
            out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    for title, reason in record["missing"].items():
        print(f"missing: {title}: {reason}", file=sys.stderr)
    if out is not None:
        out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
