"""One variant of a Triton kernel, as it is compiled without a GPU."""

from __future__ import annotations

from typing import Any, NamedTuple

SHARED_BYTES = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}
"""Architecture -> what one program may have."""

POINTER = {"float32": "*fp32", "bfloat16": "*bf16", "float16": "*fp16"}
"""Latent dtype -> Triton pointer type."""


class AotSpec(NamedTuple):
    """One variant of one kernel, as `triton.compile` wants it."""

    name: str
    """Test id."""
    kernel: Any
    """The @triton.jit function."""
    arguments: dict[str, Any]
    """Argument -> Triton type ("*bf16", "i32") or, for a constexpr, its value; None is an absent pointer."""
    num_warps: int = 4
    vector_bits: int = 0
    """Width that every load of latent size must have; 0 for kernels that touch single numbers."""
    max_registers: int | None = None
    """What the compiler is held to; it takes more for a kernel that has few warps and much to keep."""
    converts_layouts: bool = False
    """Whether blocks change from one layout to another, which takes shared memory and a barrier."""
    shared_bytes: int = 0
    """What the launcher counts on; 0 where it does not ask."""
    fp_fusion: bool = False
    """Whether products and sums may become one rounding; off where other backends must give the same bits."""

    def options(self) -> dict[str, Any]:
        """What the launch passes to the compiler."""
        options = {"num_warps": self.num_warps, "enable_fp_fusion": self.fp_fusion}
        return options if self.max_registers is None else options | {"maxnreg": self.max_registers}

    def signature(self) -> dict[str, str]:
        """Argument -> type, in the kernel's order, "constexpr" for the constants."""
        kinds = {name: kind for name, kind in self.arguments.items() if isinstance(kind, str)}
        return {name: kinds.get(name, "constexpr") for name in self.kernel.arg_names}

    def constants(self) -> dict[str, Any]:
        """Constexpr arguments and absent pointers."""
        return {name: value for name, value in self.arguments.items() if not isinstance(value, str)}

    def divisible(self) -> list[str]:
        """Arguments that are multiples of 16: pointers, and the size of a latent or token in real models."""
        kinds = self.signature().items()
        return [
            name for name, kind in kinds if kind.startswith("*") or (name in ("N", "D") and kind == "i32")
        ]
