"""Iterations beside the peers' loops: every phase runs, and both sides' results are equal.

python -m pytest bench/test_bench_iteration.py --sizes claim      pytest-benchmark, at the claim's sizes
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bench import iteration
from bench.equal_results import scored_rollout
from bench.iteration import OURS, PHASES, PUBLISHED, TUNED, cpu_contest, engine_phases, peer_phases, table
from bench.matched_loops import PEER_BATCH, engine, peer_loop, tiny_match
from bench.peer_loops import samples_of

PHASES_OF = {"dit": PHASES, "unet": tuple(phase for phase in PHASES if phase != "reference")}
"""ddpo-pytorch has no reference model."""


@pytest.mark.parametrize("contender", [PUBLISHED, TUNED, OURS])
@pytest.mark.parametrize(
    ("family", "phase"), [(family, phase) for family, phases in PHASES_OF.items() for phase in phases]
)
def test_phase(family: str, phase: str, contender: str, benchmark, is_smoke: bool) -> None:
    match = tiny_match(family, batches=1, num_steps=2)
    if not is_smoke:
        match = replace(tiny_match(family, batches=8, num_steps=6), num_updates=2)
    trainer = engine(match, microbatch_size=128)
    rollout = scored_rollout(trainer, match)
    if contender == OURS:
        phases = engine_phases(match, trainer, rollout)
    else:
        size = PEER_BATCH[match.peer] if contender == PUBLISHED else match.trajectories
        samples = samples_of(rollout, trainer.advantages(rollout))
        phases = peer_phases(match, peer_loop(match, batch_size=size), samples)
    benchmark.group = f"{match.name}, {match.peer}, {phase}"
    benchmark.pedantic(phases[phase], rounds=1 if is_smoke else 5, warmup_rounds=0 if is_smoke else 1)


@pytest.mark.parametrize("family", ["dit", "unet"])
def test_contest_times_every_phase_of_equal_results(family: str) -> None:
    result = cpu_contest(family, rounds=1, is_quick=True)
    assert {row["phase"] for row in result["rows"]} == set(PHASES_OF[family])
    assert {row["contender"] for row in result["rows"]} == {PUBLISHED, TUNED, OURS}
    assert all(row["milliseconds"] > 0 for row in result["rows"])
    assert max(result["differences"].values()) < 1e-6
    assert table(result).count("\n") == len(result["rows"])


@pytest.mark.parametrize(("options", "rounds"), [(["--quick"], 1), (["--rounds", "3"], 3)])
def test_a_record_tells_its_rounds(
    options: list[str], rounds: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    given = []

    def contest(family: str, *, rounds: int, is_quick: bool) -> dict[str, Any]:
        given.append(rounds)
        return {"model": family, "peer": "", "differences": {}, "missing": {}, "rows": []}

    monkeypatch.setattr(iteration, "cpu_contest", contest)
    out = tmp_path / "record.json"
    assert iteration.main([*options, "--models", "dit", "--out", str(out)]) == 0
    assert json.loads(out.read_text(encoding="utf-8"))["rounds"] == rounds == given[0]


def test_rounds_of_a_rehearsal_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert iteration.main(["--quick", "--rounds", "3"]) == 2
    assert "--rounds 3" in capsys.readouterr().err


@pytest.mark.claim
@pytest.mark.parametrize("family", ["dit", "unet"])
def test_an_iteration_beats_the_peers_loop_at_both_its_batches(family: str) -> None:
    result = cpu_contest(family, rounds=5, is_quick=False)
    print(f"\n{table(result)}")
    iteration = [row for row in result["rows"] if row["phase"] == "iteration"]
    ours = [row for row in iteration if row["contender"].startswith(OURS)]
    assert max(row["over_published"] for row in ours) >= 2
    assert max(row["over_tuned"] for row in ours) >= 1.2
    assert max(result["differences"].values()) < 1e-6
