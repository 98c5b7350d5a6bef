"""What the GPU kernels issue, counted in their machine code: no count rises, and the pool is fast enough."""

from __future__ import annotations

import json
import os

import pytest

triton = pytest.importorskip("triton", reason="Triton is not installed")

from bench import kernel_counts, sass  # noqa: E402

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="kernels under the interpreter are not compiled"
)

RECORDED = json.loads(kernel_counts.RESULT.read_text(encoding="utf-8"))

DISASSEMBLY = """
.text.kernel:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
.L_x_1:
        /*0010*/              @!P0 LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0020*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
.L_x_0:
        /*0030*/                   HMMA.16816.F32.BF16 R8, R4, R6, R8 ;
        /*0040*/                   NOP ;
        /*0050*/              @P1 BRA `(.L_x_0) ;
        /*0060*/              @P0 BRA `(.L_x_1) ;
        /*0070*/                   STG.E desc[UR4][R2.64], R8 ;
        /*0080*/                   EXIT ;
.L_x_2:
        /*0090*/                   BRA `(.L_x_2);
        /*00a0*/                   NOP;
"""


def test_loops_and_what_is_outside_of_them_are_counted_apart() -> None:
    outside, loop = sass.blocks(DISASSEMBLY)
    assert outside == sass.Block(instructions=3, barriers=0, products=0, copies=0, bytes_ahead=0)
    assert loop == sass.Block(instructions=2, barriers=0, products=1, copies=0, bytes_ahead=0)


def test_what_is_asked_ahead_ends_where_some_of_it_is_needed() -> None:
    loads = ["LDG.E.128 R4, desc[UR4][R2.64]", "IADD3 R2, R2, 0x10, RZ", "LDG.E.64 R8, desc[UR4][R2.64]"]
    later = ["LDG.E R10, desc[UR4][R2.64]"]
    assert sass.bytes_ahead([*loads, "STS.128 [R20], R4", *later]) == 24
    assert sass.bytes_ahead([*loads, "FADD R1, R1, R9", *later]) == 24
    assert sass.bytes_ahead([*loads, *later]) == 28


def test_what_only_a_last_program_runs_is_not_counted() -> None:
    ticket = """
        /*0061*/                   ATOMG.E.ADD.STRONG.GPU PT, R9, desc[UR6][R6.64], R9 ;
        /*0062*/               @P1 EXIT ;
        /*0063*/                   FADD R8, R8, R9 ;"""
    store = "\n        /*0070*/"
    counted = sass.blocks(DISASSEMBLY.replace(store, ticket + store))
    # The exit of the other programs is in place of the store and the end.
    assert counted == sass.blocks(DISASSEMBLY.replace("STG.E desc[UR4][R2.64], R8", "ATOMG.E R9"))


def test_occupancy_is_what_the_scarcest_resource_allows() -> None:
    nothing = sass.Block(0, 0, 0, 0, 0)
    by_registers = sass.Counts(nothing, nothing, 128, 0, 0, 4)
    assert by_registers.occupancy(90) == 16 / 64
    assert by_registers._replace(shared_bytes=100 << 10).occupancy(90) == 8 / 64
    assert by_registers._replace(registers=16).occupancy(90) == 1.0


def test_a_ceiling_is_instructions_against_bytes() -> None:
    machine = kernel_counts.Machine("any", 100, 1.0, 1.0)
    # 100 x 4 x 32 instructions of threads per nanosecond, 1000 bytes per nanosecond.
    assert machine.ceiling(12.8 * 4, 2) == pytest.approx(0.5)
    assert machine.ceiling(1.0, 100) == 1.0


def test_a_count_that_rises_is_named() -> None:
    spec, by_architecture = next(iter(RECORDED["rows"].items()))
    counts = by_architecture["sm_90"]
    risen = counts | {"registers": counts["registers"] + 1}
    more = {"rows": {spec: {"sm_90": risen}, "new": {"sm_90": counts}}}
    assert kernel_counts.risen(RECORDED, more) == [
        f"{spec} on sm_90: registers {counts['registers']} -> {counts['registers'] + 1}",
        "new on sm_90 is not recorded",
    ]
    fewer = {"rows": {spec: {"sm_90": counts | {"instructions": 0.5}}}}
    assert kernel_counts.risen(RECORDED, fewer) == []


@pytest.mark.slow
@pytest.mark.parametrize("spec", [row.spec for row in kernel_counts.ROWS if "tiles" in row.spec])
def test_instructions_leave_value_pool_four_fifths_of_the_bandwidth(spec: str) -> None:
    assert min(kernel_counts.pool_ceilings(spec, range(1, 9)).values()) >= 0.8


@pytest.mark.parametrize("architecture", ["sm_90", "sm_100"])
@pytest.mark.parametrize("spec", [row.spec for row in kernel_counts.ROWS if "tiles" in row.spec])
def test_bulk_copies_could_not_raise_what_the_pool_may_reach(spec: str, architecture: str) -> None:
    counts = RECORDED["rows"][spec][architecture]
    # All that they could save is issue slots, of which there are enough, and time without requests.
    assert counts["ceiling"] == 1.0
    assert counts["allowed"] > 1.5
    assert counts["copies"] < 0.2 * counts["instructions"]
    assert counts["nanoseconds covered"] > 1000


def test_a_drawn_normal_takes_at_most_38_instructions() -> None:
    assert RECORDED["rows"]["normal_noise-1024x2x4"]["sm_90"]["instructions"] <= 38


@pytest.mark.slow
@pytest.mark.skipif(
    triton.__version__ != RECORDED["triton"], reason=f"recorded with Triton {RECORDED['triton']}"
)
def test_no_count_rises() -> None:
    assert kernel_counts.risen(RECORDED, kernel_counts.counted()) == []
