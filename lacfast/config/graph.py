"""How steps are captured in CUDA graphs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lacfast.config.checks import Config, Count, require_unset

GraphMode = Literal["auto", "on", "off", "fake"]


@dataclass(frozen=True, kw_only=True)
class GraphConfig(Config):
    """How steps are captured in CUDA graphs: sampling, and whatever else runs the same step many times."""

    mode: GraphMode = "auto"
    """"auto": a CUDA device captures the steps whose launches bound them; "on": it captures all; "off": none;
    "fake": recorded and replayed on any device, slowly, to find what a graph would freeze."""
    warmup_steps: Count = 3
    """Eager steps before a capture: they compile kernels, fill caches and are timed; none is lost."""
    strict: bool = False
    """Raise where a step cannot be captured, instead of running it eagerly after one warning."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mode == "off":
            require_unset(self, ("warmup_steps", "strict"), "mode='off' captures nothing")
