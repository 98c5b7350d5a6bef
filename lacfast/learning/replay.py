"""What the critic learns from after a rollout: its states, and those of the rollouts before it.

The policy must learn from its own trajectories; what states are worth changes little from one rollout to the
next, so the critic may see a state more than once. Experience replay: L.-J. Lin, Machine Learning 8, 1992.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lacfast.critic.critic import Critic
from lacfast.critic.trunk import Features
from lacfast.learning.pairs import Pairs, all_states, minibatches
from lacfast.records import Conditioning, Rollout


@dataclass(frozen=True)
class Experience:
    """The states of a rollout and what they were worth, all that a critic reads of it."""

    latents: Tensor
    """(T, B, ...), before each step."""
    features: Features
    """name -> (T, B, ...)"""
    conditioning: Conditioning
    """(B, ...)"""
    targets: Tensor
    """(B, M) standardised and clipped, in the units of that time."""
    reward_mean: Tensor
    """(M,) raw reward of target 0."""
    reward_std: Tensor
    """(M,) raw reward in one unit of the targets."""

    @staticmethod
    def of(rollout: Rollout, targets: Tensor, critic: Critic) -> Experience:
        """A rollout whose rewards are in the critic's units already."""
        return Experience(
            rollout.latents[:-1],
            rollout.features,
            rollout.conditioning,
            targets,
            critic.reward_mean.clone(),
            critic.reward_std.clone(),
        )

    @property
    def num_steps(self) -> int:
        return self.latents.shape[0]

    @property
    def batch_size(self) -> int:
        return self.latents.shape[1]

    def targets_for(self, critic: Critic) -> Tensor:
        """(B, M) in the critic's units of today."""
        raw = self.targets * self.reward_std + self.reward_mean
        return ((raw - critic.reward_mean) / critic.reward_std).to(self.targets.dtype)


class ValueReplay:
    """The last rollouts, as far as the critic reads them."""

    def __init__(self, rollouts: int) -> None:
        """`rollouts`: that a pass draws from, today's included; 1 keeps none."""
        self._kept: deque[Experience] = deque(maxlen=rollouts - 1)

    def minibatches(
        self, today: Experience, count: int, generator: torch.Generator
    ) -> Iterator[tuple[Experience, Pairs]]:
        """`count` minibatches, which together have as many states as today's rollout.

        Each is of one rollout, drawn at random, and has states of it that no earlier one had.

        Raises:
            ValueError: for fewer states than minibatches.
        """
        known = [*self._kept, today]
        parts = [list(minibatches(all_states(experience), count, generator)) for experience in known]
        for part in range(count):
            drawn = int(torch.randint(len(known), (), generator=generator)) if self._kept else 0
            yield known[drawn], parts[drawn][part]

    def add(self, experience: Experience) -> None:
        """Keep what has been learned from, and forget the oldest."""
        self._kept.append(experience)

    def state_dict(self) -> list[dict[str, Any]]:
        """State of all that is kept."""
        return [
            vars(experience) | {"conditioning": experience.conditioning.tensors} for experience in self._kept
        ]

    def load_state_dict(self, states: Sequence[dict[str, Any]], device: torch.device) -> None:
        """Continue from a `state_dict`, on the device of the model."""
        self._kept.clear()
        for state in states:
            maps = {name: _moved(state[name], device) for name in ("features", "conditioning")}
            tensors = {name: tensor.to(device) for name, tensor in state.items() if name not in maps}
            conditioning = Conditioning(maps["conditioning"])
            self._kept.append(Experience(**tensors, features=maps["features"], conditioning=conditioning))


def _moved(tensors: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    return {name: tensor.to(device) for name, tensor in tensors.items()}
