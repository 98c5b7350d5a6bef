"""The states that a critic reads: where they are kept, and how those on the host come to its device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from lacfast.critic.trunk import Features
from lacfast.records import Conditioning
from lacfast.runtime.host_memory import Staging


class StateSource(Protocol):
    """What states are gathered from: a rollout, or what is kept of one."""

    @property
    def latents(self) -> Tensor:
        """(T or T + 1, B, ...)"""

    @property
    def features(self) -> Features:
        """name -> (T, B, ...), what the critic reads."""

    @property
    def conditioning(self) -> Conditioning:
        """(B, ...)"""

    @property
    def num_steps(self) -> int: ...

    @property
    def batch_size(self) -> int: ...


def state_bytes(source: StateSource) -> int:
    """Bytes of a state with its prompt, as a minibatch has it."""
    prompt = sum(tensor[0].nbytes for tensor in source.conditioning.tensors.values())
    return prompt + sum(tensor[0, 0].nbytes for tensor in (source.latents, *source.features.values()))


@dataclass(frozen=True)
class GatheredStates:
    """P states on the critic's device, but for their timesteps."""

    features: Features
    """name -> (P, ...)"""
    sample: Tensor
    """(P, ...) latents before the step."""
    conditioning: Conditioning
    """(P, ...)"""
    steps: Tensor
    """(P,) int64"""
    rows: Tensor
    """(P,) int64 trajectory."""


def gathered(source: StateSource, steps: Tensor, rows: Tensor, staging: Staging) -> GatheredStates:
    """States of a source on the host, for work that is launched before the staging's next.

    Args:
        source: of B trajectories.
        steps: (P,) int64 on the host.
        rows: (P,) int64 on the host, the trajectories.
        staging: of the device that they go to.
    """
    states, every = steps * source.batch_size + rows, torch.arange(len(rows))
    kept = {f"features.{name}": (tensor.flatten(0, 1), states) for name, tensor in source.features.items()}
    kept |= {f"conditioning.{name}": (tensor, rows) for name, tensor in source.conditioning.tensors.items()}
    kept |= {"sample": (source.latents.flatten(0, 1), states), "steps": (steps, every), "rows": (rows, every)}
    found = staging.gather(kept)

    def part(prefix: str) -> dict[str, Tensor]:
        return {
            name.removeprefix(prefix): tensor for name, tensor in found.items() if name.startswith(prefix)
        }

    return GatheredStates(
        part("features."), found["sample"], Conditioning(part("conditioning.")), found["steps"], found["rows"]
    )
