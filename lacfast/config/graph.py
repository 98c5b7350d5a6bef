"""How steps are captured in CUDA graphs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lacfast.config.checks import require

GraphMode = Literal["auto", "on", "off", "fake"]


@dataclass(frozen=True, kw_only=True)
class GraphConfig:
    """How steps are captured in CUDA graphs: sampling, and whatever else runs the same step many times."""

    mode: GraphMode = "auto"
    """"auto": a CUDA device captures the steps whose launches bound them; "on": it captures all; "off": none;
    "fake": recorded and replayed on any device, slowly, to find what a graph would freeze."""
    unroll: int = 1
    """Steps per graph, a launch of which costs some 10 us; 4 to 10 for steps below about 150 us."""
    max_steps: int = 0
    """Denoising steps that the sampler's memory holds; a longer schedule captures anew. 0: the first's."""
    warmup_steps: int = 3
    """Eager steps before a capture, >= 1: they compile kernels, fill caches and are timed; none is lost."""
    strict: bool = False
    """Raise where a step cannot be captured, instead of running it eagerly after one warning."""

    def __post_init__(self) -> None:
        modes = ("auto", "on", "off", "fake")
        require(self.mode in modes, f"unknown graph mode {self.mode!r}; known: {', '.join(modes)}")
        require(self.unroll >= 1, f"unroll={self.unroll} must be at least 1")
        require(self.max_steps >= 0, f"max_steps={self.max_steps} must be >= 0 (0: the first schedule's)")
        require(self.warmup_steps >= 1, f"warmup_steps={self.warmup_steps} must be at least 1")
