"""The kernel table: no time without equal results, medians within rounds, one failure costs one row."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from bench import kernels, roofline
from bench.graph_timing import cold_and_hot, graph_seconds, num_copies
from bench.interleaved import affordable_rounds, race, speed_ups
from bench.shapes import BEYOND_CACHE, TINY_LATENT, LatentCase
from bench.workloads import latents, verified
from bench.workloads.critics import LOOP, VECTORIZED
from bench.workloads.libraries import LIGER, QUACK, TORCHRL_LOOP, TORCHRL_VECTORIZED
from bench.workloads.workload import OURS, OURS_DRAWN, PEER, PEER_DRAWN, REFERENCE, Workload, WrongResultError
from lacfast import _C

CPU = torch.device("cpu")


@pytest.fixture
def workload() -> Workload:
    return latents.gaussian_step(TINY_LATENT, torch.float32, CPU, compiled=False)


def test_who_draws_its_noise_is_compared_with_who_draws_it_too(workload: Workload) -> None:
    assert workload.baseline_of(OURS) == workload.baseline_of(PEER_DRAWN) == workload.baseline
    assert workload.baseline_of(OURS_DRAWN) == PEER_DRAWN
    without = replace(workload, providers={OURS_DRAWN: workload.providers[OURS_DRAWN]})
    assert without.baseline_of(OURS_DRAWN) == workload.baseline
    measured = kernels.measure_cpu(workload, budget=0.0)
    rows = {row["provider"]: row for row in kernels.rows_of(workload, measured, 1e9)}
    assert rows[OURS_DRAWN]["baseline"] == PEER_DRAWN
    assert rows[PEER_DRAWN]["baseline"] == workload.baseline


def test_a_peer_that_draws_is_held_to_the_formula_on_its_own_noise(workload: Workload) -> None:
    workload.verify()
    draws, state = workload.providers[PEER_DRAWN], torch.random.get_rng_state()
    workload.verify()
    assert torch.equal(torch.random.get_rng_state(), state), "the caller's generator stays where it was"
    wrong = {PEER_DRAWN: lambda given: (draws(given)[0] + 1e-3, *draws(given)[1:])}
    with pytest.raises(WrongResultError, match=f"result 0 of '{PEER_DRAWN}'".replace("'", "[\"']")):
        replace(workload, providers=workload.providers | wrong).verify()


@pytest.fixture(autouse=True)
def small_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond the caches they take seconds; test_roofline.py times such a one."""
    monkeypatch.setattr(roofline, "copy_bandwidth", partial(roofline.copy_bandwidth, num_bytes=1 << 20))


class Clock:
    """Time that passes only when a provider says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


def test_race_times_every_second_call_in_turn() -> None:
    clock, order = Clock(), []

    def provider(name: str, seconds: float) -> None:
        order.append(name)
        clock.advance(seconds)

    providers = {"slow": lambda: provider("slow", 3.0), "fast": lambda: provider("fast", 1.0)}
    seconds = race(providers, rounds=2, warmup=1, clock=clock)
    assert seconds == {"slow": [3.0, 3.0], "fast": [1.0, 1.0]}
    assert order == ["slow", "fast", *["slow", "slow", "fast", "fast"] * 2]
    assert affordable_rounds(providers, 100.0, clock=clock) == 12
    assert affordable_rounds(providers, 1.0, clock=clock) == 5


def test_speed_up_is_the_median_of_ratios_within_rounds() -> None:
    # The machine was ten times slower in the second round, for both.
    seconds = {"peer": [2.0, 30.0, 2.0], "ours": [1.0, 10.0, 1.0]}
    assert speed_ups(seconds, "peer") == {"peer": 1.0, "ours": 2.0}


def test_wrong_results_are_not_timed(workload: Workload) -> None:
    def broken(given: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        prev_sample, log_prob = workload.providers[OURS](given)
        return prev_sample * 1.001, log_prob

    workload.verify()
    with pytest.raises(WrongResultError, match="result 0 of 'lacfast' is off by"):
        replace(workload, providers=workload.providers | {OURS: broken}).verify()
    nan = {OURS: lambda given: tuple(torch.full_like(part, torch.nan) for part in broken(given))}
    with pytest.raises(WrongResultError):
        replace(workload, providers=workload.providers | nan).verify()


def test_given_noise_is_the_drawn_one(workload: Workload) -> None:
    given, drawn = (workload.providers[name](workload.inputs) for name in (OURS, OURS_DRAWN))
    torch.testing.assert_close(given, drawn, rtol=1e-5, atol=1e-5)


def test_clones_lie_elsewhere_and_keep_their_gradients() -> None:
    workload = verified("ppo_loss", TINY_LATENT, torch.float32, compiled=False)
    copy = workload.cloned()
    assert copy["model_output"].requires_grad
    assert not copy["noise"].requires_grad
    for name, tensor in workload.inputs.items():
        assert torch.equal(copy[name], tensor)
        assert copy[name].data_ptr() != tensor.data_ptr()


def test_rows_hold_bandwidth_of_the_fused_op(workload: Workload) -> None:
    measured = {OURS: {"seconds": 1e-6, "speed_up": 2.0}, PEER: {"error": "it broke"}}
    ours, peer = kernels.rows_of(workload, measured, copy_bandwidth=1e10)
    # 420 elements: x, v, eps, x' in float32.
    assert ours["gigabytes_per_second"] == pytest.approx(420 * 16 / 1e-6 / 1e9)
    assert ours["percent_of_copy"] == pytest.approx(100 * 420 * 16 / 1e-6 / 1e10)
    assert ours["microseconds"] == pytest.approx(1.0)
    assert peer["error"] == "it broke"
    assert "microseconds" not in peer
    text = kernels.table([ours, peer])
    assert "2.00x" in text
    assert "it broke" in text


def test_a_workload_that_fails_leaves_its_reason_and_the_next_one_runs(workload: Workload) -> None:
    def broken() -> Workload:
        raise RuntimeError("out of memory")

    kept: list[kernels.Row] = []
    missing = kernels.collect(
        [("first", broken), ("second", lambda: workload)],
        lambda _: {OURS: {"seconds": 1.0, "speed_up": 1.0}},
        1e9,
        seconds=60,
        on_rows=kept.extend,
    )
    assert missing == {"first": "RuntimeError: out of memory"}
    assert [row["provider"] for row in kept] == [OURS]


def test_nothing_is_started_after_the_time(workload: Workload) -> None:
    clock, kept = Clock(), []

    def measure(_: Workload) -> dict[str, kernels.Row]:
        clock.advance(20)
        return {OURS: {"seconds": 1.0, "speed_up": 1.0}}

    planned = [(title, lambda: workload) for title in ("first", "second")]
    missing = kernels.collect(planned, measure, 1e9, seconds=10, on_rows=kept.extend, clock=clock)
    assert missing == {"second": "not started within 10 s"}
    assert len(kept) == 1


def test_copies_pass_the_cache_within_the_memory() -> None:
    assert num_copies(10, cache=50, free=10**6) == 20
    assert num_copies(10, cache=50, free=200) == 5
    assert num_copies(1, cache=10**6, free=10**9) == 200
    assert num_copies(10**9, cache=50, free=10**9) == 1


def test_cold_times_go_round_over_copies_and_hot_ones_stay(workload: Workload) -> None:
    seen = []

    def timer(call, copies) -> float:
        seen.append(len({copy["sample"].data_ptr() for copy in copies}))
        call(copies[-1])
        return float(len(copies))

    times = cold_and_hot(workload, seconds=timer, cache=3 * workload.num_bytes // 4, free=10**9)
    assert set(times) == set(workload.providers)
    assert set(times.values()) == {(3.0, 1.0)}
    assert seen == [3, 1] * len(workload.providers)


def test_a_provider_that_cannot_be_captured_says_so(workload: Workload) -> None:
    def timer(call, copies) -> float:
        if call is workload.providers[REFERENCE]:
            raise RuntimeError("operation not permitted\nwhen stream is capturing")
        return 1.0

    times = cold_and_hot(workload, seconds=timer, cache=0, free=10**9)
    assert times[REFERENCE] == "RuntimeError: operation not permitted"
    assert times[OURS] == (1.0, 1.0)


def test_command_writes_rows_with_their_machine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "kernels.json"
    arguments = ["--cases", "tiny", "--no-compile", "--budget", "0.01", "--ops", "gae", "--out", str(out)]
    assert kernels.main(arguments) == 0
    result = json.loads(out.read_text(encoding="utf-8"))
    assert result["missing"] == {}
    assert {row["provider"] for row in result["rows"]} == {
        *(LOOP, VECTORIZED, TORCHRL_LOOP, TORCHRL_VECTORIZED),
        *(REFERENCE, OURS),
    }
    assert result["copy_gigabytes_per_second"] > 0
    assert result["machine"]["versions"]["torch"] == torch.__version__
    assert "gae, tiny" in capsys.readouterr().out


@pytest.mark.skipif("x86-64-v3" not in _C.instruction_sets(), reason="about processors with AVX2")
def test_an_older_instruction_set_holds_both_sides(tmp_path: Path) -> None:
    out = tmp_path / "kernels.json"
    arguments = ["--avx2", "--cases", "tiny", "--no-compile", "--budget", "0.01", "--ops", "gae"]
    assert kernels.main([*arguments, "--out", str(out)]) == 0
    processor = json.loads(out.read_text(encoding="utf-8"))["machine"]["processor"]
    assert processor["instruction set (torch)"] == "AVX2"
    assert processor["instruction set (lacfast)"] == "x86-64-v3"


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
def test_command_says_what_it_lacks(capsys: pytest.CaptureFixture[str]) -> None:
    assert kernels.main(["--device", "cuda"]) == 2
    assert "needs a CUDA device" in capsys.readouterr().err


def test_a_part_goes_on_where_earlier_ones_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "kernels.json"
    tiny = ["--cases", "tiny", "--no-compile", "--budget", "0.01", "--out", str(out)]
    assert kernels.main([*tiny, "--ops", "gae"]) == 0
    first = json.loads(out.read_text(encoding="utf-8"))["rows"]
    assert kernels.main([*tiny, "--resume", "--ops", "gae", "effective_sample_size"]) == 0
    rows = json.loads(out.read_text(encoding="utf-8"))["rows"]
    assert rows[: len(first)] == first
    assert {row["op"] for row in rows[len(first) :]} == {"effective_sample_size"}
    monkeypatch.setattr(kernels.machine, "describe", lambda _: {"label": "another"})
    assert kernels.main([*tiny, "--resume", "--ops", "gae"]) == 2
    assert "has another machine" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--max-autotune"], "--max-autotune tunes what is compiled for a GPU"),
        (["--max-autotune", "--device", "cuda", "--no-compile"], "leave out --no-compile"),
        (["--cases", "beyond-cache"], "add --device cuda"),
        (["--resume"], "pass an existing --out, not None"),
        (["--resume", "--out", "nowhere.json"], "pass an existing --out, not nowhere.json"),
    ],
)
def test_an_option_that_would_be_ignored_is_refused(
    arguments: list[str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert kernels.main(arguments) == 2
    assert reason in capsys.readouterr().err


def test_times_on_a_gpu_stand_beside_an_empty_node(
    workload: Workload, monkeypatch: pytest.MonkeyPatch
) -> None:
    times = dict.fromkeys(workload.providers, (4e-6, 3e-6)) | {REFERENCE: "RuntimeError: not captured"}
    monkeypatch.setattr(kernels, "cold_and_hot", lambda _: times)
    rows = kernels.measure_cuda(workload, empty_node=1.5e-6)
    assert rows[OURS]["empty_nodes"] == pytest.approx(2.0)
    assert rows[OURS]["speed_up"] == 1.0
    assert "2.0 empty nodes" in kernels.table(kernels.rows_of(workload, {OURS: rows[OURS]}, 1e9))


def test_command_runs_on_a_gpu_in_parts(
    cuda: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    timer = partial(graph_seconds, calls=2, replays=1)
    monkeypatch.setattr(kernels, "cold_and_hot", partial(cold_and_hot, seconds=timer))
    # These two need what is not pretended: a compiled kernel, and memory beyond a cache.
    monkeypatch.setattr(kernels, "empty_node_seconds", lambda: 1e-3)
    monkeypatch.setattr(kernels.roofline, "copy_bandwidth", lambda device: 1e12)
    out, ops = tmp_path / "kernels.json", ("step_log_prob", "value_pool")
    part = ["--device", "cuda", "--cases", "tiny", "--no-compile", "--out", str(out), "--ops", *ops]
    assert kernels.main([*part, "--seconds", "-1"]) == 1
    first = json.loads(out.read_text(encoding="utf-8"))
    assert first["rows"] == []
    assert len(first["missing"]) == 4
    assert kernels.main([*part, "--resume"]) == 0
    rows = json.loads(out.read_text(encoding="utf-8"))["rows"]
    assert {row["op"] for row in rows if row["provider"] == OURS and row["empty_nodes"] > 0} == set(ops)
    assert {row["provider"] for row in rows if "error" in row} <= {LIGER, QUACK}
    assert {LIGER, QUACK} <= {row["provider"] for row in rows}


def test_what_is_beyond_the_cache_exceeds_it_in_16_bits() -> None:
    for cases in BEYOND_CACHE.values():
        for case in cases:
            is_latent = isinstance(case, LatentCase)
            elements = case.elements if is_latent else case.batch * case.tokens * case.features
            assert elements >= 32 << 20
