"""How the engine runs in an arm: eager, compiled, captured in graphs, or both; and when it has settled."""

from __future__ import annotations

import math
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from lacfast.metrics import compiled_graphs

if TYPE_CHECKING:
    from lacfast.trainer import LatentActorCriticTrainer

EAGER = "eager"
PREPARE_SECONDS = 90.0
"""Within which an arm compiles, or it would take the time of all others."""


@dataclass(frozen=True, kw_only=True)
class Arm:
    """How the engine runs."""

    is_compiled: bool
    is_captured: bool


ARMS = {
    EAGER: Arm(is_compiled=False, is_captured=False),
    "compile": Arm(is_compiled=True, is_captured=False),
    "graph": Arm(is_compiled=False, is_captured=True),
    "compile+graph": Arm(is_compiled=True, is_captured=True),
}


def arm_changes(arm: Arm, device: torch.device) -> dict[str, Any]:
    """Fields of TrainConfig. Without a CUDA device the fake graph takes the graph's place."""
    from lacfast.config import GraphConfig

    captured = "on" if device.type == "cuda" else "fake"
    graph = GraphConfig(mode=captured, strict=True) if arm.is_captured else GraphConfig(mode="off")
    return {"graph": graph, "compile": arm.is_compiled}


class CompiledForwards:
    """The compiled forwards of a model's blocks, in place only while an arm runs that has them."""

    def __init__(self) -> None:
        self._forwards: dict[torch.nn.Module, Any] = {}

    def take(self, model: torch.nn.Module) -> None:
        """Take them off the model, whose blocks then run as they are."""
        from lacfast.backbones.compilation import CompiledForward

        for block in model.modules():
            if isinstance(block.__dict__.get("forward"), CompiledForward):
                self._forwards[block] = block.__dict__.pop("forward")

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Within the context the blocks run compiled."""
        for block, forward in self._forwards.items():
            block.forward = forward
        try:
            yield
        finally:
            for block in self._forwards:
                del block.forward


def unsettled(trainer: LatentActorCriticTrainer | None) -> tuple[int, ...]:
    """Counts that rise while an arm still compiles, warms up or captures."""
    if trainer is None:
        return ()
    found = trainer.graphs.statistics
    graphs = (found.captures, found.eager_steps) if trainer.graphs.captures else ()
    return (*graphs, compiled_graphs())


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Stop what runs in the context after `seconds`; inf: never.

    Raises:
        TimeoutError: then, in the middle of it.
    """

    def stop(*_: Any) -> None:
        raise TimeoutError(f"not compiled within {seconds:.3g} s")

    handler = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, 0.0 if math.isinf(seconds) else seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, handler)
