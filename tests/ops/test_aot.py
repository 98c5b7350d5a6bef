"""Every Triton kernel compiles for sm_80, sm_90, sm_100 without a GPU, fits in registers, moves vectors."""

import importlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

from bench import sass
from bench.aot_spec import SHARED_BYTES
from bench.aot_specifications import SPECIFICATIONS
from lacfast.kernels import launch

ARCHITECTURES = [80, 90, 100]
MAX_REGISTERS = 128

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="kernels under the interpreter are not compiled"
)

LAUNCHED = {
    "normal_noise": ("normal_noise_kernel",),
    "gaussian_step": ("gaussian_step_kernel",),
    "step_log_prob": ("step_log_prob_kernel",),
    "step_log_prob_backward": ("step_log_prob_backward_kernel",),
    "ppo_loss": ("transition_sums_kernel",),
    "ppo_loss_backward": ("transition_grad_kernel",),
    "value_pool": ("pool_kernel", "pool_grad_kernel"),
}
"""Table of launches -> the kernels that are launched by it."""
TICKET = ["store", "fence", "ticket", "invalidate", "barrier", "exit", "load"]
"""How a part goes to whoever adds it, however the threads of a program and its caches are ordered."""
MEASURED = 90
"""The architecture of the GPUs that the device checks run on."""


def cases() -> Iterator[Any]:
    """Every variant for every architecture; all but the first of each file, for one, are left to the gate."""
    for variants in SPECIFICATIONS.values():
        for position, spec in enumerate(variants):
            for architecture in ARCHITECTURES:
                if spec.shared_bytes > SHARED_BYTES[architecture]:
                    continue
                is_rest = position > 0 or architecture != MEASURED
                marks = [pytest.mark.slow] if is_rest else []
                yield pytest.param(spec, architecture, marks=marks, id=f"{spec.name}-sm_{architecture}")


def test_every_file_that_launches_is_compiled() -> None:
    folder = Path(__file__).parents[2] / "kernels"
    with_kernels = {path.stem for path in folder.glob("*.py") if "compiled.run(" in path.read_text()}
    assert with_kernels == set(SPECIFICATIONS)


def test_every_variant_has_a_name_of_its_own() -> None:
    names = [spec.name for variants in SPECIFICATIONS.values() for spec in variants]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("name", SPECIFICATIONS)
def test_every_launched_kernel_has_a_spec(name: str) -> None:
    module = importlib.import_module(f"lacfast.kernels.{name}")
    text = Path(module.__file__).read_text()
    launched = re.findall(r"compiled\.run\(\s*(\w+)", text)
    assert "_kernel[" not in text, "launched beside what is compiled"
    assert set(launched) == {spec.kernel.__name__ for spec in SPECIFICATIONS[name]}


@pytest.mark.parametrize("op", launch.names())
def test_every_launch_of_the_tables_is_compiled(op: str) -> None:
    specs = [spec for variants in SPECIFICATIONS.values() for spec in variants]
    for kernel in LAUNCHED[op]:
        found = [spec for spec in specs if spec.kernel.__name__ == kernel]
        sizes = [(spec.constants(), spec.num_warps) for spec in found]
        shapes = {
            (each.get("BLOCK_N", each.get("BLOCK_L")), each.get("BLOCKS", 1), warps) for each, warps in sizes
        }
        assert set(launch.shapes(op)) <= shapes, kernel


@pytest.mark.parametrize(("spec", "architecture"), list(cases()))
def test_kernel_compiles_without_spills(spec, architecture: int, tmp_path: Path) -> None:
    compiled = sass.compile_kernel(spec, architecture)
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    usage = sass.resource_usage(cubin)
    assert usage["STACK"] == 0
    assert usage["LOCAL"] == 0
    assert usage["REG"] <= (spec.max_registers or MAX_REGISTERS)
    if spec.shared_bytes:
        assert compiled.metadata.shared <= spec.shared_bytes
    if spec.arguments.get("tickets_ptr"):
        assert around_the_ticket(sass.instructions_of(sass.disassembly(compiled))) == TICKET

    # Moving a block from one layout to another goes through shared memory and a barrier.
    if not spec.converts_layouts:
        assert "convert_layout" not in compiled.asm["ttgir"]
    if spec.vector_bits:
        # Behind a ticket are the sums of parts, one number each.
        loads = global_load_bits(compiled.asm["ptx"].partition("atom.")[0])
        assert loads.count(128) + loads.count(64) > 0
        assert min(loads) >= spec.vector_bits, f"a load of a block moves {min(loads)} bits"


def around_the_ticket(instructions: list[str]) -> list[str]:
    """From the last part's store to the first load of all parts, what orders the two."""
    kinds = {
        "STG": "store",
        "MEMBAR.ALL.GPU": "fence",
        "ATOMG": "ticket",
        "CCTL.IVALL": "invalidate",
        "BAR.SYNC": "barrier",
        "EXIT": "exit",
        "LDG": "load",
    }
    found = [kind for each in instructions for name, kind in kinds.items() if each.startswith(name)]
    (ticket,) = (i for i, kind in enumerate(found) if kind == "ticket")
    first = max(i for i in range(ticket) if found[i] == "store")
    last = next(i for i in range(ticket, len(found)) if found[i] == "load")
    # A barrier between the store and the fence is Triton's, of shared memory.
    return [kind for i, kind in enumerate(found[first : last + 1]) if kind != "barrier" or i > ticket - first]


def global_load_bits(ptx: str) -> list[int]:
    """Bits per thread of every masked load: blocks are read with a mask, single numbers without."""
    vectors = re.findall(r"@%p\d+ ld\.global(?:\.v(\d))?\.b(\d+)", ptx)
    return [int(count or 1) * int(bits) for count, bits in vectors]
