"""What a compiled kernel issues, counted in its machine code: no GPU is needed to compile, nor to count.

A loop whose trips a launch decides counts once per trip, what is outside of every loop once per program.
Branches are not followed: both sides count, so a count is an upper bound. What only the last program of a
sample runs, behind the exit of those whose ticket is not the last (kernels/tickets.py), is not of a program.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bench.aot_spec import AotSpec

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
REGISTERS, SHARED_BYTES, WARPS, PROGRAMS = 65_536, {80: 164 << 10, 90: 228 << 10, 100: 228 << 10}, 64, 32
"""Of one multiprocessor."""
SYSTEM_BYTES = 1024
"""Shared memory that every program leaves to the system."""
BARRIERS = ("BAR", "WARPSYNC")
COPIES = ("LDG", "STS", "LDGSTS")
_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;")
_PREDICATE = re.compile(r"^@!?U?P\w+\s+")
_LABEL = re.compile(r"^(\.L\S+):")
_BRANCH = re.compile(r"\bBRA\b.*`\((\.L\S+)\)")


class Block(NamedTuple):
    """Instructions of one warp, once through."""

    instructions: int
    barriers: int
    products: int
    """Of tensor cores."""
    copies: int
    """Loads from memory and stores to shared memory, which a bulk copy would take over."""
    bytes_ahead: int
    """What a thread has asked the memory for when it first needs some of it."""


class Counts(NamedTuple):
    """A kernel, as compiled."""

    outside: Block
    """Outside of every loop."""
    loop: Block
    """The longest innermost loop, once; zeros without a loop."""
    registers: int
    spilled_bytes: int
    shared_bytes: int
    warps: int

    def occupancy(self, architecture: int) -> float:
        """Share of a multiprocessor's warps that are there at once, by registers and shared memory."""
        # Registers are given to a warp by 8 for each of its 32 threads.
        per_warp = -(-self.registers // 8) * 8 * 32
        by_registers = REGISTERS // per_warp // self.warps
        by_shared = SHARED_BYTES[architecture] // (self.shared_bytes + SYSTEM_BYTES)
        return min(by_registers, by_shared, PROGRAMS, WARPS // self.warps) * self.warps / WARPS


def compile_kernel(spec: AotSpec, architecture: int) -> Any:
    """The kernel as its launch compiles it, for sm_`architecture`."""
    index = {name: i for i, name in enumerate(spec.kernel.arg_names)}
    source = ASTSource(
        spec.kernel,
        signature=spec.signature(),
        constexprs={(index[name],): value for name, value in spec.constants().items()},
        attrs={(index[name],): [["tt.divisibility", 16]] for name in spec.divisible()},
    )
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=spec.options())


def counts(compiled: Any) -> Counts:
    """Of a kernel of compile_kernel."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        usage = resource_usage(cubin)
    outside, loop = blocks(disassembly(compiled))
    return Counts(
        outside,
        loop,
        usage["REG"],
        usage["STACK"] + usage["LOCAL"],
        compiled.metadata.shared,
        compiled.metadata.num_warps,
    )


def disassembly(compiled: Any) -> str:
    """Its machine code, as nvdisasm prints it."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        return _printed("nvdisasm", "-c", cubin)


def instructions_of(text: str) -> list[str]:
    """Without predicates, in the order of a disassembly."""
    found = (_INSTRUCTION.match(line) for line in text.splitlines())
    return [_PREDICATE.sub("", each[1]) for each in found if each]


def resource_usage(cubin: Path) -> dict[str, int]:
    """REG, STACK, SHARED and LOCAL of the only kernel in a cubin."""
    printed = _printed("cuobjdump", "--dump-resource-usage", cubin)
    return {key: int(number) for key, number in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", printed)}


def blocks(text: str) -> tuple[Block, Block]:
    """What is outside of all loops and the longest innermost loop, of a disassembly.

    What follows the last EXIT is padding, a jump to itself; what follows the first one behind a ticket is the
    last program's.
    """
    instructions: list[str] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(instructions)
        elif found := _INSTRUCTION.match(line):
            instructions.append(_PREDICATE.sub("", found[1]))
    exits = [i for i, each in enumerate(instructions) if each.startswith("EXIT")]
    tickets = [i for i, each in enumerate(instructions) if each.startswith("ATOMG")]
    end = 1 + (exits[-1] if not tickets else next(i for i in exits if i > tickets[0]))
    loops = []
    for i, instruction in enumerate(instructions[:end]):
        target = _BRANCH.search(instruction)
        if target and labels[target[1]] <= i:
            loops.append((labels[target[1]], i + 1))
    innermost = [
        (start, stop)
        for start, stop in loops
        if not any((start, stop) != other and start <= other[0] and other[1] <= stop for other in loops)
    ]
    inside = {i for start, stop in loops for i in range(start, stop)}
    start, stop = max(innermost, key=lambda each: each[1] - each[0], default=(0, 0))
    return _block([each for i, each in enumerate(instructions[:end]) if i not in inside]), _block(
        instructions[start:stop]
    )


def _block(instructions: list[str]) -> Block:
    kinds = Counter(re.split(r"[.\s]", each)[0] for each in instructions if not each.startswith("NOP"))
    products = sum(number for kind, number in kinds.items() if kind.endswith("MMA"))
    barriers, copies = (sum(kinds[each] for each in group) for group in (BARRIERS, COPIES))
    return Block(sum(kinds.values()), barriers, products, copies, bytes_ahead(instructions))


def bytes_ahead(instructions: list[str]) -> int:
    """Bytes of the loads before the first instruction that reads a register which one of them fills."""
    filled: set[int] = set()
    total = 0
    for each in instructions:
        registers = [int(number) for number in re.findall(r"\bR(\d+)", each)]
        if each.startswith("LDG"):
            size = int(found[1]) // 8 if (found := re.match(r"LDG\S*\.(64|128)", each)) else 4
            filled.update(range(registers[0], registers[0] + size // 4))
            total += size
        elif filled.intersection(registers):
            break
    return total


@cache
def _tool(name: str) -> str:
    path = TOOLS / name
    if not path.exists():
        raise FileNotFoundError(f"{path} is not there; Triton's wheel for Linux has it")
    return str(path)


def _printed(tool: str, *arguments: str | Path) -> str:
    return subprocess.run([_tool(tool), *arguments], capture_output=True, text=True, check=True).stdout
