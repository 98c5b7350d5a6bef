"""What a compiled kernel issues, counted in its machine code: no GPU is needed to compile, nor to count.

A loop whose trips a launch decides counts once per trip, what is outside of every loop once per program.
Branches are not followed: both sides count, so a count is an upper bound.
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
_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;")
_LABEL = re.compile(r"^(\.L\S+):")
_BRANCH = re.compile(r"\bBRA\b.*`\((\.L\S+)\)")


class Block(NamedTuple):
    """Instructions of one warp, once through."""

    instructions: int
    barriers: int
    products: int
    """Of tensor cores."""


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
        text = _printed("nvdisasm", "-c", cubin)
    outside, loop = blocks(text)
    return Counts(
        outside,
        loop,
        usage["REG"],
        usage["STACK"] + usage["LOCAL"],
        compiled.metadata.shared,
        compiled.metadata.num_warps,
    )


def resource_usage(cubin: Path) -> dict[str, int]:
    """REG, STACK, SHARED and LOCAL of the only kernel in a cubin."""
    printed = _printed("cuobjdump", "--dump-resource-usage", cubin)
    return {key: int(number) for key, number in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", printed)}


def blocks(text: str) -> tuple[Block, Block]:
    """What is outside of all loops and the longest innermost loop, of a disassembly.

    What follows the last EXIT is padding, a jump to itself.
    """
    instructions: list[str] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(instructions)
        elif found := _INSTRUCTION.match(line):
            instructions.append(re.sub(r"^@!?U?P\w+\s+", "", found[1]))
    end = max(i for i, each in enumerate(instructions) if each.startswith("EXIT")) + 1
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
    return Block(sum(kinds.values()), sum(kinds[each] for each in BARRIERS), products)


@cache
def _tool(name: str) -> str:
    path = TOOLS / name
    if not path.exists():
        raise FileNotFoundError(f"{path} is not there; Triton's wheel for Linux has it")
    return str(path)


def _printed(tool: str, *arguments: str | Path) -> str:
    return subprocess.run([_tool(tool), *arguments], capture_output=True, text=True, check=True).stdout
