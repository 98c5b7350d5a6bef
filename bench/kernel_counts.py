"""Bytes, instructions and barriers per element of every op's kernel, and what they allow: no GPU needed.

    python -m bench.kernel_counts            counts, beside what is recorded
    python -m bench.kernel_counts --write    records the counts: bench/results/kernel-counts.json

A multiprocessor issues four instructions of warps per cycle. Where that many per second do not move as many
bytes as the memory does, the instructions are the limit: the ceiling is the share of the memory's copy
bandwidth that they allow, 100 % where they allow more. It is a bound, nothing measured: it has no latency.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton

from bench import roofline, sass
from bench.aot_spec import AotSpec
from bench.aot_specifications import SPECIFICATIONS
from lacfast.kernels import value_pool_tiles

RESULT = Path(__file__).resolve().parent / "results" / "kernel-counts.json"
HEADS = 4
"""Queries of a pool, as many as one program of the tensor cores' kernel has."""


class Machine(NamedTuple):
    """What a published data sheet says; a copy reaches nine tenths of the published bandwidth."""

    name: str
    multiprocessors: int
    gigahertz: float
    copy_terabytes: float

    def allowed(self, instructions: float, num_bytes: float) -> float:
        """Bandwidth in units of the copy's for instructions of threads and bytes, both per element."""
        issued = self.multiprocessors * 4 * self.gigahertz * 1e9 * 32
        return issued / instructions * num_bytes / (self.copy_terabytes * 1e12)

    def ceiling(self, instructions: float, num_bytes: float) -> float:
        """Share of the copy bandwidth."""
        return min(1.0, self.allowed(instructions, num_bytes))

    def covered(self, num_bytes: float) -> float:
        """Nanoseconds that a multiprocessor's share of the copy bandwidth takes for so many bytes."""
        return num_bytes * self.multiprocessors / self.copy_terabytes / 1e3


MACHINES = {
    80: Machine("A100 SXM 80 GB", 108, 1.41, 1.8),
    90: Machine("H100 SXM", 132, 1.755, 3.0),
    100: Machine("B200", 148, 1.965, 7.2),
}
"""By architecture."""


class Row(NamedTuple):
    """One op as it is launched for a large latent or a large feature map."""

    label: str
    spec: str
    """Of SPECIFICATIONS."""
    num_bytes: float
    """Per element."""


def _bytes(op: str, dtype: torch.dtype, noise: str = "drawn", reference: bool = False) -> int:
    return roofline.elementwise(op, 1, dtype, noise=noise, reference=reference).bytes


_HALF, _SINGLE = torch.bfloat16, torch.float32
ROWS = (
    Row("`normal_noise`", "normal_noise-1024x2x4", _bytes("normal_noise", _SINGLE)),
    Row(
        "`gaussian_step`, float32, noise given",
        "gaussian_step-float32-float32-1024x2x4-noise_float32",
        _bytes("gaussian_step", _SINGLE, "given"),
    ),
    Row(
        "`gaussian_step`, float32, noise drawn",
        "gaussian_step-float32-float32-1024x2x4-noise_None",
        _bytes("gaussian_step", _SINGLE),
    ),
    Row(
        "`gaussian_step`, bfloat16, guided, noise drawn",
        "gaussian_step-bfloat16-bfloat16-1024x2x4-noise_None-guided",
        _bytes("gaussian_step, guided", _HALF),
    ),
    Row("`step_log_prob`, float32", "step_log_prob-float32-float32-1024x2x4", 12),
    Row("`step_log_prob`, bfloat16", "step_log_prob-bfloat16-bfloat16-1024x2x4", 6),
    Row("its backward, bfloat16", "step_log_prob_backward-bfloat16-bfloat16-1024x1x4-all", 8),
    Row(
        "`ppo_loss`, float32, anchor, noise given",
        "ppo_loss-float32-1024x2x4-noise_float32-everything",
        _bytes("ppo_loss", _SINGLE, "given", reference=True),
    ),
    Row(
        "`ppo_loss`, bfloat16, anchor, noise drawn",
        "ppo_loss-bfloat16-1024x2x4-noise_None",
        _bytes("ppo_loss", _HALF, reference=True),
    ),
    Row(
        "its backward, bfloat16, anchor, noise drawn",
        "ppo_loss_grad-bfloat16-1024x1x4-noise_None",
        _bytes("ppo_loss, backward", _HALF, reference=True),
    ),
    Row("`value_pool`, bfloat16, D = 1536", "value_pool_tiles-D1536-split", 2),
    Row("`value_pool`, bfloat16, D = 3072", "value_pool_tiles-D3072-split", 2),
    Row("its backward, bfloat16, D = 1536", "value_pool_tiles_grad-D1536-split", 2),
    Row("its backward, bfloat16, D = 3072", "value_pool_tiles_grad-D3072-split", 2),
    Row("`value_pool`, float32, D = 1536", "value_pool-float32-D1536-Q4", 4),
    Row("its backward, float32, D = 1536", "value_pool_grad-float32-D1536-Q4", 4),
)


def specification(name: str) -> AotSpec:
    """By its name."""
    (found,) = (spec for variants in SPECIFICATIONS.values() for spec in variants if spec.name == name)
    return found


def elements(spec: AotSpec) -> int:
    """Elements of one program, or where it is a loop over tokens of one trip."""
    constants = spec.constants()
    if "CHUNKS" in constants:
        return int(constants["BLOCK_L"] * constants["D"])
    if "BLOCK_L" in constants:
        return int(constants["BLOCK_L"] * constants["BLOCK_D"])
    return int(constants["BLOCK_N"] * constants.get("BLOCKS", 1))


def count(row: Row, architecture: int) -> dict[str, Any]:
    """What the row's kernel has on one architecture."""
    spec = specification(row.spec)
    found = sass.counts(sass.compile_kernel(spec, architecture))
    is_loop = "BLOCK_L" in spec.constants()
    block = found.loop if is_loop else found.outside
    if not is_loop and found.loop.instructions:
        raise ValueError(f"{spec.name} has a loop on sm_{architecture}, which is not counted; unroll it")
    instructions = block.instructions * found.warps * 32 / elements(spec)
    occupancy, machine = found.occupancy(architecture), MACHINES[architecture]
    in_flight = block.bytes_ahead * 32 * occupancy * sass.WARPS
    return {
        "bytes": row.num_bytes,
        "instructions": round(instructions, 2),
        "barriers per 1024": round(block.barriers / elements(spec) * 1024, 3),
        "registers": found.registers,
        "spilled bytes": found.spilled_bytes,
        "occupancy": occupancy,
        "ceiling": round(machine.ceiling(instructions, row.num_bytes), 3),
        "allowed": round(machine.allowed(instructions, row.num_bytes), 2),
        "copies": round(block.copies * found.warps * 32 / elements(spec), 2),
        "kilobytes in flight": round(in_flight / 1e3, 1),
        "nanoseconds covered": round(machine.covered(in_flight)),
    }


def pool_ceilings(spec: str, heads: range, architecture: int = 90) -> dict[int, float]:
    """Queries -> ceiling of the bfloat16 value_pool: groups of them read the tokens again, from L2."""
    instructions = count(Row("", spec, 2), architecture)["instructions"]
    groups = {number: triton.cdiv(number, value_pool_tiles.HEADS) for number in heads}
    machine = MACHINES[architecture]
    return {number: machine.ceiling(instructions * each, 2) for number, each in groups.items()}


def fits(row: Row, architecture: int) -> bool:
    """Whether the row's kernel is launched there at all."""
    return specification(row.spec).shared_bytes <= sass.SHARED_BYTES[architecture] - sass.SYSTEM_BYTES


def counted() -> dict[str, Any]:
    """All rows on all architectures."""
    rows = {
        row.spec: {f"sm_{each}": count(row, each) for each in MACHINES if fits(row, each)} for row in ROWS
    }
    return {"triton": triton.__version__, "rows": rows}


RISING = ("instructions", "barriers per 1024", "registers", "spilled bytes")
"""What must not become more."""


def risen(recorded: dict[str, Any], found: dict[str, Any]) -> list[str]:
    """Every count that is above what was recorded, or was never recorded."""
    lines = []
    for spec, by_architecture in found["rows"].items():
        for architecture, counts in by_architecture.items():
            before = recorded["rows"].get(spec, {}).get(architecture)
            if before is None:
                lines.append(f"{spec} on {architecture} is not recorded")
                continue
            lines += [
                f"{spec} on {architecture}: {name} {before[name]} -> {counts[name]}"
                for name in RISING
                if counts[name] > before[name]
            ]
    return lines


def table(record: dict[str, Any]) -> str:
    """What is recorded, as Markdown: cells are sm_80 / sm_90 / sm_100."""
    names = ("instructions", "barriers per 1024", "registers", "occupancy", "ceiling")
    lines = [
        "| per element | bytes | instructions | barriers / 1,024 | registers | occupancy, % | ceiling, % |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in ROWS:
        by_architecture = record["rows"][row.spec].values()
        cells = []
        for name in names:
            scale = 100 if name in ("occupancy", "ceiling") else 1
            digits = {"instructions": 1, "barriers per 1024": 1}.get(name, 0)
            cells.append(" / ".join(f"{counts[name] * scale:.{digits}f}" for counts in by_architecture))
        lines.append(f"| {row.label} | {row.num_bytes:g} | {' | '.join(cells)} |")
    machines = "; ".join(
        f"sm_{each}: {machine.name}, {machine.multiprocessors} multiprocessors at {machine.gigahertz:g} GHz, "
        f"{machine.copy_terabytes:g} TB/s"
        for each, machine in MACHINES.items()
    )
    spilling = [
        row.label
        for row in ROWS
        if any(counts["spilled bytes"] for counts in record["rows"][row.spec].values())
    ]
    note = (
        "Counted in the machine code that Triton "
        f"{record['triton']} compiles, nothing timed: sm_80 / sm_90 / sm_100, sm_90 / sm_100 where a tile "
        f"does not fit into the first's shared memory; {', '.join(spilling) or 'no kernel of the table'} "
        "spills. Instructions are those of one thread. The ceiling is the share of a copy's bandwidth that "
        "the instructions allow at the published clocks and nine tenths of the published bandwidth "
        f"({machines}). "
        f"`value_pool` has Q = {HEADS}; `python -m bench.kernel_counts` counts."
    )
    return "\n".join([*lines, "", note, "", bulk_copies(record)])


def bulk_copies(record: dict[str, Any]) -> str:
    """What bulk copies (TMA) could save of the bfloat16 pool on their first architecture, as a sentence."""
    cells = []
    for row in ROWS:
        if not row.spec.startswith("value_pool_tiles"):
            continue
        counts = record["rows"][row.spec]["sm_90"]
        cells.append(
            f"{row.label}: {counts['copies']:.2f} of {counts['instructions']:.1f}; "
            f"{counts['allowed']:.1f} times; {counts['kilobytes in flight']:.0f} KB, "
            f"{counts['nanoseconds covered'] / 1e3:.1f} us"
        )
    return (
        "Bulk copies (TMA) would take over the loads from memory and the stores to shared memory. On sm_90, "
        "how many of the instructions per element these are; how much of a copy's bandwidth all instructions "
        "allow, the memory aside; what the programs of a multiprocessor ask the memory for before they need "
        f"any of it, and how long it takes at that bandwidth. {'. '.join(cells)}."
    )


def main(arguments: list[str]) -> int:
    """Print the counts; --write records them, otherwise 1 where one rose."""
    options = argparse.ArgumentParser(prog="python -m bench.kernel_counts")
    options.add_argument("--write", action="store_true", help="record them")
    chosen = options.parse_args(arguments)
    found = counted()
    print(table(found))
    if chosen.write:
        RESULT.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        return 0
    lines = risen(json.loads(RESULT.read_text(encoding="utf-8")), found)
    for line in lines:
        print(line, file=sys.stderr)
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
