"""What the ahead-of-time compile test needs of a kernel: one record per variant that the launchers can ask for.

A GPU is not needed to compile, so every variant is proven (no spills, few registers, vector loads) where none is.
"""

from typing import Any, NamedTuple

POINTER = {"float32": "*fp32", "bfloat16": "*bf16", "float16": "*fp16"}
"""Latent dtype -> Triton pointer type."""


class AotSpec(NamedTuple):
    """One variant of one kernel, as `triton.compile` wants it."""

    name: str
    """Test id."""
    kernel: Any
    """The @triton.jit function."""
    signature: dict[str, str]
    """Argument -> type, in the kernel's order, without the constexprs; what is missing is a constexpr."""
    constants: dict[str, Any]
    """Constexpr arguments, absent pointers (None) among them."""
    num_warps: int
    vector_bytes: int
    """Width of the widest global load that must appear; 0 for kernels that touch single numbers."""

    def divisible(self) -> list[str]:
        """Arguments that are multiples of 16: all pointers and the latent's size, as in every real model."""
        return [name for name, kind in self.signature.items() if kind.startswith("*") or name == "N"]
