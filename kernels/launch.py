"""Blocks and warps of every kernel, by op, size of one latent and GPU architecture: data, no autotune.

The numbers lie in launches.json beside this file. A row holds for sizes up to its `elements`; an
architecture without a table of its own uses "default". `measured` says whether a row was timed on that
architecture or is a starting point by reasoning about occupancy. `python -m bench.tune` times the candidates
on a GPU and writes what it found.

A launch depends on one latent's size and never on the batch: the order of its sums must not either.
"""

import json
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
import triton

LAUNCHES = Path(__file__).with_name("launches.json")
DEFAULT = "default"


class Launch(NamedTuple):
    """One row of a table."""

    elements: int
    """The largest size that it is used for."""
    block: int
    """Elements (for value_pool: tokens) that a program handles at a time."""
    blocks: int
    """Blocks of one program."""
    num_warps: int
    measured: bool = False
    """Timed on this architecture, not reasoned about."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """block, blocks, num_warps"""
        return self.block, self.blocks, self.num_warps


def names() -> list[str]:
    """The ops that have a table."""
    return list(_tables())


def table(op: str) -> dict[str, list[Launch]]:
    """Architecture ("sm_90", "default") -> rows by ascending size."""
    if op not in _tables():
        raise ValueError(f"no launch table for {op!r}; known: {', '.join(_tables())}")
    return _tables()[op]


def architecture_of(device: torch.device) -> str:
    """ "sm_90" for a CUDA device of compute capability 9.0; "default" for others (the interpreter's)."""
    if device.type != "cuda":
        return DEFAULT
    return _cuda_architecture(torch.cuda.current_device() if device.index is None else device.index)


def shared_bytes(device: torch.device) -> int:
    """Shared memory that one program may have; an H100's for others than CUDA devices (the interpreter's)."""
    if device.type != "cuda":
        return 227 << 10
    return _cuda_shared_bytes(torch.cuda.current_device() if device.index is None else device.index)


@cache
def pick_launch(op: str, elements: int, architecture: str) -> tuple[int, int, int, int]:
    """block, blocks and num_warps for one latent's size, and the number of programs that share the latent."""
    rows = table(op).get(architecture) or table(op)[DEFAULT]
    for row in rows:
        if elements <= row.elements:
            return *row.shape, triton.cdiv(elements, row.block * row.blocks)
    raise ValueError(f"{elements} elements in one latent; {op} is launched for at most {rows[-1].elements}")


def shapes(op: str) -> list[tuple[int, int, int]]:
    """Every (block, blocks, num_warps) that some architecture uses: what has to compile."""
    return list(dict.fromkeys(row.shape for rows in table(op).values() for row in rows))


def candidates(op: str) -> list[tuple[int, int, int]]:
    """(block, blocks, num_warps) worth timing: 4 to 16 elements per thread, so that loads are vectors."""
    table(op)
    return [
        (block, blocks, num_warps)
        for block in (256, 512, 1024, 2048, 4096)
        for num_warps in (2, 4, 8)
        for blocks in (1, 2, 4, 8)
        if 4 <= block // (32 * num_warps) <= 16
    ]


def write(op: str, architecture: str, rows: list[Launch], path: Path = LAUNCHES) -> None:
    """Replace the table of an op on one architecture; rows need no order."""
    if not rows:
        raise ValueError(f"no rows for {op} on {architecture}; a table needs at least one")
    tables = json.loads(path.read_text()) if path.exists() else {}
    ordered = [row._asdict() for row in sorted(rows)]
    tables.setdefault(op, {})[architecture] = ordered
    path.write_text(_as_json(tables))
    if path == LAUNCHES:
        _tables.cache_clear()
        pick_launch.cache_clear()


def _as_json(tables: dict[str, dict[str, list[dict[str, int]]]]) -> str:
    """One row per line, so that a change of one launch is a change of one line."""
    ops = []
    for op, by_architecture in tables.items():
        parts = [
            f'    "{name}": [\n' + ",\n".join(f"      {json.dumps(row)}" for row in rows) + "\n    ]"
            for name, rows in by_architecture.items()
        ]
        ops.append(f'  "{op}": {{\n' + ",\n".join(parts) + "\n  }")
    return "{\n" + ",\n".join(ops) + "\n}\n"


@cache
def _tables() -> dict[str, dict[str, list[Launch]]]:
    return {
        op: {name: [Launch(**row) for row in rows] for name, rows in by_architecture.items()}
        for op, by_architecture in json.loads(LAUNCHES.read_text()).items()
    }


@cache
def _cuda_architecture(index: int) -> str:
    major, minor = torch.cuda.get_device_capability(index)
    return f"sm_{major}{minor}"


@cache
def _cuda_shared_bytes(index: int) -> int:
    # One KiB of every program is the system's.
    return int(torch.cuda.get_device_properties(index).shared_memory_per_multiprocessor) - 1024
