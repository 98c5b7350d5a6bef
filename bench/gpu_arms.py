"""Sampling and update of random-weight models in four arms: eager, compile, graph, compile+graph.

    python -m bench.gpu_arms sampling                    on a CUDA device, to the screen
    python -m bench.gpu_arms update --out PATH
    python -m bench.gpu_arms sampling --tiny             a rehearsal with tiny models
    python -m bench.gpu_arms sampling --device cpu       the same in fewer arms

Arms take turns on the same work at batch 1, 4 and 16, and their results are compared; "values" is what the
values of all steps add. Times are those of a denoising step and of a (sample, step) pair; memory is counted
over the weights: of a call that replays, and of those before, which compile and capture. Where memory ran
out, the batch is the smaller one that ran. What does not fit the time or the memory leaves its reason.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from bench import machine
from bench.arms import ARMS, EAGER, PREPARE_SECONDS, CompiledForwards, arm_changes, time_limit, unsettled
from bench.interleaved import Provider, race, speed_ups
from lacfast.config import BatchMean, CriticValues

if TYPE_CHECKING:
    from bench.random_models import Subject
    from lacfast.backbones.latent import LatentBackbone
    from lacfast.records import Rollout
    from lacfast.trainer import LatentActorCriticTrainer

BATCHES = (1, 4, 16)
TRUNKS = ("none", "shared", "branch")
VALUE_BATCH = 4
MOST_CAPTURES = 8
"""Calls after which an arm has compiled, warmed up and captured all that it ever will."""
Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How much is measured."""

    device: torch.device
    dtype: torch.dtype
    batches: tuple[int, ...] = BATCHES
    rounds: int = 5
    arms: tuple[str, ...] = tuple(ARMS)
    prepare_seconds: float = math.inf
    """Limit of a call that compiles, besides its work; an arm beyond it is left out for its model."""


def trainer_of(
    subject: Subject,
    backbone: LatentBackbone,
    *,
    microbatch_size: int = 1,
    trunk: str = "none",
    **changes: Any,
) -> LatentActorCriticTrainer:
    """A trainer on a backbone that others may share: the critic is its own."""
    from bench.matched_loops import brightness
    from bench.random_models import PROMPT
    from lacfast.config import AdvantageConfig, CriticConfig, TrainConfig
    from lacfast.trainer import LatentActorCriticTrainer

    own = copy.copy(backbone)
    own.critic = None
    config = TrainConfig(
        batch_size=max(BATCHES),
        sampler=subject.sampler,
        critic=CriticConfig(trunk=trunk),
        advantages=AdvantageConfig(estimator=BatchMean() if trunk == "none" else CriticValues()),
        ppo=replace(subject.ppo, microbatch_size=microbatch_size, num_minibatches=1),
        **changes,
    )
    return LatentActorCriticTrainer(own, brightness, [PROMPT], config)


def rollout_of(trainer: LatentActorCriticTrainer, batch: int) -> Rollout:
    """A rollout with its rewards, from sample ids 0 on; it belongs to the caller."""
    rollout = trainer.collect(trainer.prompts.cycle(batch), 0)
    assert rollout is not None
    return rollout


@dataclass(frozen=True, kw_only=True)
class Work:
    """What an arm repeats."""

    call: Callable[[], Any]
    trainer: LatentActorCriticTrainer | None = None
    size: Callable[[], int] | None = None
    """Trajectories or pairs that run at a time, fewer than asked once memory has run out; 0: all."""


class Bench:
    """One subject: one model, and a trainer per arm on it."""

    def __init__(self, subject: Subject, plan: Plan) -> None:
        self.subject = subject
        self.plan = plan
        self.backbone = subject.build(plan.dtype)
        self.compiled = CompiledForwards()
        self._too_slow: dict[str, str] = {}

    def trainer(self, arm: str, microbatch_size: int = 1) -> LatentActorCriticTrainer:
        trainer = trainer_of(
            self.subject,
            self.backbone,
            microbatch_size=microbatch_size,
            **arm_changes(ARMS[arm], self.plan.device),
        )
        self.compiled.take(self.backbone.model)
        return trainer

    def sampling(self) -> Iterable[Row]:
        """Milliseconds of a denoising step."""
        trainers = {arm: self.trainer(arm) for arm in self.plan.arms}
        steps = self.subject.sampler.num_steps
        for batch in self.plan.batches:
            prompts = trainers[EAGER].prompts.cycle(batch)
            works = {
                arm: Work(
                    call=self._running(arm, partial(trainer.rollout, prompts, 0)),
                    trainer=trainer,
                    size=partial(getattr, trainer.actor.part_size, "size"),
                )
                for arm, trainer in trainers.items()
            }
            yield from self._rows("sampling", batch, works, steps, self._same_latents)
        yield from self._value_rows("sampling", steps)

    def update(self) -> Iterable[Row]:
        """Milliseconds of a (sample, step) pair, the reference in it where there is one."""
        for batch in self.plan.batches:
            # One trajectory has no advantage over the batch's mean.
            rollout = rollout_of(self.trainer(EAGER), max(batch, 2))
            pairs = rollout.batch_size * len(rollout.table.trainable_steps)
            trainers = {arm: self.trainer(arm, batch) for arm in self.plan.arms}
            works = {
                arm: Work(
                    call=self._running(arm, partial(trainer.update, rollout)),
                    trainer=trainer,
                    size=partial(getattr, trainer.learner.policy_update.microbatch, "size"),
                )
                for arm, trainer in trainers.items()
            }
            yield from self._rows("update", batch, works, pairs, self._same_losses)
        yield from self._value_rows("update", VALUE_BATCH * len(rollout.table.trainable_steps))

    def _running(self, arm: str, call: Callable[[], Any]) -> Callable[[], Any]:
        """The call with the model's blocks as the arm has them."""

        def run() -> Any:
            with self.compiled.in_place() if ARMS[arm].is_compiled else nullcontext():
                return call()

        return run

    def _value_rows(self, phase: str, work: int) -> Iterable[Row]:
        """The same without a critic, with heads on the actor's taps, and with a branch; eagerly."""
        works: dict[str, Work] = {}
        for trunk in TRUNKS:
            trainer = trainer_of(
                self.subject, self.backbone, microbatch_size=VALUE_BATCH, trunk=trunk,
                **arm_changes(ARMS[EAGER], self.plan.device),
            )  # fmt: skip
            if phase == "sampling":
                works[trunk] = Work(call=partial(trainer.rollout, trainer.prompts.cycle(VALUE_BATCH), 0))
            else:
                works[trunk] = Work(call=partial(trainer.update, rollout_of(trainer, VALUE_BATCH)))
        for row in self._rows(phase, VALUE_BATCH, works, work, None):
            yield row | {"arm": EAGER, "values": row["arm"]}

    def _rows(
        self,
        phase: str,
        batch: int,
        works: dict[str, Work],
        units: int,
        compare: Callable[[Any, Any], float] | None,
    ) -> Iterable[Row]:
        first = next(iter(works))
        expected, kept, rows, usual = None, {}, {}, 0.0
        for name, work in works.items():
            rows[name] = {"model": self.subject.title, "phase": phase, "batch": batch, "arm": name}
            try:
                compiles = name in ARMS and ARMS[name].is_compiled
                # The work of a call is no compilation.
                limit = self.plan.prepare_seconds + 2 * usual if compiles else math.inf
                result = self._prepared(name, work, rows[name], limit)
                start = time.perf_counter()
                rows[name]["working_gigabytes"] = self._peak_gigabytes(work.call)
                usual = usual or time.perf_counter() - start
            except Exception as error:
                # One arm that cannot run must not cost the others' times.
                rows[name]["error"] = f"{type(error).__name__}: {error}".splitlines()[0]
                continue
            kept[name] = self._synchronised(work.call)
            if compare is not None:
                expected = result if expected is None else expected
                rows[name]["difference"] = compare(result, expected)
        if first in kept:
            seconds = race(kept, rounds=self.plan.rounds, warmup=1, clock=time.perf_counter, is_primed=False)
            ratios = speed_ups(seconds, first)
            for name, times in seconds.items():
                rows[name]["milliseconds"] = 1e3 * statistics.median(times) / units
                rows[name][f"over_{first}"] = ratios[name]
        for name in kept:
            size = works[name].size
            ran = min((size() if size is not None else 0) or batch, batch)
            if ran < batch:
                # Memory ran out, so that it is the time of another batch.
                rows[name] |= {"batch": ran, "asked": batch}
                rows[name].pop(f"over_{first}", None)
        return rows.values()

    def _prepared(self, name: str, work: Work, row: Row, limit: float) -> Any:
        """What a call returns after those that compile, warm up and capture; their peak goes into the row.

        Raises:
            TimeoutError: for an arm of which a call takes more than `limit` seconds.
            RuntimeError: for one that captures again and again.
        """
        if name in self._too_slow:
            raise TimeoutError(self._too_slow[name])
        peaks = []

        def call() -> None:
            nonlocal result
            result = work.call()

        result = None
        for _ in range(MOST_CAPTURES):
            before = unsettled(work.trainer)
            try:
                with time_limit(limit):
                    peaks.append(self._peak_gigabytes(call))
            except TimeoutError as error:
                # Its next batch would wait as long.
                self._too_slow[name] = str(error)
                raise
            if len(peaks) > 1 and unsettled(work.trainer) == before:
                row["preparing_gigabytes"] = max(peaks)
                return result
        raise RuntimeError(f"still compiles, warms up or captures after {MOST_CAPTURES} calls")

    def _synchronised(self, call: Callable[[], Any]) -> Provider:
        def provider() -> None:
            call()
            if self.plan.device.type == "cuda":
                torch.cuda.synchronize(self.plan.device)

        return provider

    def _peak_gigabytes(self, call: Callable[[], Any]) -> float:
        """The peak over what is allocated before, weights and captured graphs for the most part."""
        if self.plan.device.type != "cuda":
            call()
            return 0.0
        torch.cuda.synchronize(self.plan.device)
        torch.cuda.reset_peak_memory_stats(self.plan.device)
        before = torch.cuda.memory_allocated(self.plan.device)
        call()
        torch.cuda.synchronize(self.plan.device)
        return (torch.cuda.max_memory_allocated(self.plan.device) - before) / 2**30

    @staticmethod
    def _same_latents(own: Rollout, expected: Rollout) -> float:
        return float((own.clean_latents - expected.clean_latents).norm() / expected.clean_latents.norm())

    @staticmethod
    def _same_losses(own: dict[str, Any], expected: dict[str, Any]) -> float:
        """Relative difference of the gradient's norm."""
        return abs(own["policy_grad_norm"] / expected["policy_grad_norm"] - 1)


def collect(
    phase: str,
    subjects: Iterable[Subject],
    plan: Plan,
    *,
    seconds: float,
    on_rows: Callable[[list[Row]], None],
) -> dict[str, str]:
    """Measure what fits `seconds`; returns model -> why it has no, or not all, rows."""
    start, missing = time.monotonic(), {}
    for subject in subjects:
        if time.monotonic() - start > seconds:
            missing[subject.title] = f"not started within {seconds:g} s"
            continue
        torch.compiler.reset()
        try:
            bench = Bench(subject, plan)
            for row in bench.sampling() if phase == "sampling" else bench.update():
                on_rows([row])
                if time.monotonic() - start > seconds:
                    missing[subject.title] = f"stopped after {seconds:g} s"
                    break
        except Exception as error:
            missing[subject.title] = f"{type(error).__name__}: {error}".splitlines()[0]
        # Before the next model is made; graphs and compiled code hold on to the last one.
        bench = None
        if plan.device.type == "cuda":
            torch.cuda.empty_cache()
    return missing


def line(row: Row) -> str:
    batch = f"{row['batch']} of {row['asked']}" if "asked" in row else str(row["batch"])
    label = f"{row['model']:<20}{row['phase']:<10}batch {batch:<8}"
    label += f"{row['arm']:<14}" if "values" not in row else f"{'values: ' + row['values']:<14}"
    if "error" in row:
        return f"{label}{row['error'][:60]}"
    ratio = row.get("over_eager", row.get("over_none"))
    return (
        f"{label}{row['milliseconds']:10.3f} ms {'-' if ratio is None else f'{ratio:.2f}x':>7}"
        f" {row['working_gigabytes']:6.2f} GiB ({row['preparing_gigabytes']:.2f} before)"
        f"  difference {row.get('difference', 0.0):.1e}"
    )


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(prog="python -m bench.gpu_arms", description=__doc__.split("\n")[0])
    options.add_argument("phase", choices=("sampling", "update"))
    options.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    options.add_argument("--seconds", type=float, default=480.0, help="start no measurement after this")
    options.add_argument(
        "--prepare", type=float, default=PREPARE_SECONDS, help="limit of a call that compiles"
    )
    options.add_argument("--tiny", action="store_true", help="tiny models, one batch; always so on a CPU")
    options.add_argument("--out", type=Path, help="JSON")
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    if importlib.util.find_spec("diffusers") is None:
        print("gpu_arms: diffusers is not installed, and the models are its own", file=sys.stderr)
        return 2
    if options.device == "cuda" and not torch.cuda.is_available():
        print("gpu_arms: no CUDA device here; --device cpu rehearses with tiny models", file=sys.stderr)
        return 2
    from bench.random_models import subjects, tiny_subjects

    device = torch.device(options.device)
    is_rehearsal = options.tiny or device.type == "cpu"
    plan = Plan(device=device, dtype=torch.bfloat16, prepare_seconds=options.prepare)
    if is_rehearsal:
        plan = replace(plan, batches=(2,), rounds=1)
    if device.type == "cpu":
        torch.set_num_threads(1)
        plan = replace(plan, dtype=torch.float32, arms=(EAGER, "graph"))
    result: dict[str, Any] = {"machine": machine.describe(device), "rows": [], "missing": {}}

    def keep(rows: list[Row]) -> None:
        print("\n".join(line(row) for row in rows), flush=True)
        result["rows"] += rows
        if options.out is not None:
            options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")

    chosen = tiny_subjects(device) if is_rehearsal else subjects(device)
    result["missing"] = collect(options.phase, chosen, plan, seconds=options.seconds, on_rows=keep)
    for title, reason in result["missing"].items():
        print(f"missing: {title}: {reason}", file=sys.stderr)
    if options.out is not None:
        options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    failed = [row for row in result["rows"] if "error" in row]
    # A model may be too large for a GPU; that nothing ran, or an arm of the rehearsal failed, is a fault.
    return 1 if not result["rows"] or (failed and is_rehearsal) else 0


if __name__ == "__main__":
    sys.exit(main())
