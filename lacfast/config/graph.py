"""How steps are captured in CUDA graphs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lacfast.config.checks import Config, Count
from lacfast.config.unread import Unread

GraphMode = Literal["auto", "on", "off", "fake"]


@dataclass(frozen=True, kw_only=True)
class GraphConfig(Config):
    """How steps are captured in CUDA graphs: sampling, and whatever else runs the same step many times."""

    UNREAD = (
        Unread(
            options=("warmup_steps", "strict"),
            where=lambda graph: graph.mode == "off",
            because=lambda graph: ": mode='off' captures nothing",
        ),
    )
    mode: GraphMode = "auto"
    """"auto": a CUDA device captures the steps whose launches bound them; "on": it captures all; "off": none;
    "fake": recorded and replayed on any device, slowly, to find what a graph would freeze."""
    warmup_steps: Count = 3
    """Eager steps before a capture: they compile kernels, fill caches and are timed; none is lost."""
    strict: bool = False
    """Raise where a step cannot be captured, instead of running it eagerly after one warning."""
